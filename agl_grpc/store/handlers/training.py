"""Training runs and their metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import Order, PageRequest, check_size, fetch_page
from agl_grpc.store.errors import draining, invalid_field
from agl_grpc.store.events.watches import CHECKPOINT_SECONDS, LogEntry, LogWatch
from agl_grpc.store.handlers.common import change
from agl_grpc.store.rollouts.filters import run_key_of
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import position
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.training import batches
from agl_grpc.store.training import runs as training
from agl_grpc.store.training.runs import (
    TERMINAL,
    TRAINING_RUN,
    load_log,
    load_metrics,
    load_training,
    training_by_id,
)
from agl_grpc.v1 import trainer_service_pb2 as pb

_METRICS_PAGE = 200


class TrainingHandlers:
    """Serves training runs."""

    def __init__(self, side: WriteSide) -> None:
        self._side = side
        self._store = side.store

    async def create_training_run(self, request: pb.CreateTrainingRunRequest, call: Call) -> bytes:
        """A training run that waits for a trainer."""

        def run(tx: Tx) -> pb.CreateTrainingRunResponse:
            scope = self._side.catalog.run(tx, request.training_run.run_id)
            key = training.create(tx, scope, request.training_run)
            return pb.CreateTrainingRunResponse(training_run=load_training(tx.connection, key))

        return await change(self._store, call, request, run)

    async def get_training_run(
        self, request: pb.GetTrainingRunRequest, _call: Call
    ) -> pb.GetTrainingRunResponse:
        """One training run."""

        def read(db: Connection) -> pb.GetTrainingRunResponse:
            key = training_by_id(db, request.training_run_id).key
            return pb.GetTrainingRunResponse(training_run=load_training(db, key))

        return await self._store.read(read)

    async def list_training_runs(
        self, request: pb.ListTrainingRunsRequest, _call: Call
    ) -> pb.ListTrainingRunsResponse:
        """Training runs in order of their making."""
        size = check_size(request.page_size)

        def read(db: Connection) -> pb.ListTrainingRunsResponse:
            where, values = ["TRUE"], list[object]()
            run_key = run_key_of(db, request.run_id or "*")
            if run_key is not None:
                where.append("t.run_key = ?")
                values.append(run_key)
            if request.status_in:
                where.append(f"t.status IN ({','.join(str(int(status)) for status in request.status_in)})")
            order = Order("t.training_key", "t.training_key", descending=False)
            wanted = PageRequest(size, request.page_token, 0, count=False)
            page = fetch_page(db, "training_runs t", " AND ".join(where), values, order, wanted)
            found = [load_training(db, key) for key in page.keys]
            return pb.ListTrainingRunsResponse(training_runs=found, next_page_token=page.next_token)

        return await self._store.read(read)

    async def acquire_training_run(self, request: pb.AcquireTrainingRunRequest, call: Call) -> bytes:
        """The next epoch; what the epoch before had claimed and not committed is given back."""

        def run(tx: Tx) -> pb.AcquireTrainingRunResponse:
            row = training_by_id(tx.connection, request.training_run_id)
            training.acquire(tx, row, request.trainer_id, only_pending=request.only_pending)
            batches.release_all(tx, row)
            return pb.AcquireTrainingRunResponse(training_run=load_training(tx.connection, row.key))

        return await change(self._store, call, request, run)

    async def finish_training_run(self, request: pb.FinishTrainingRunRequest, call: Call) -> bytes:
        """The end, said by the trainer that has the run."""

        def run(tx: Tx) -> pb.FinishTrainingRunResponse:
            row = training.held_training(tx, request.training_run_id, request.trainer_epoch)
            failure = request.failure if request.HasField("failure") else None
            result = request.result if request.HasField("result") else None
            training.finish(tx, row, request.status, failure, result)
            return pb.FinishTrainingRunResponse(training_run=load_training(tx.connection, row.key))

        return await change(self._store, call, request, run)

    async def stop_training_run(self, request: pb.StopTrainingRunRequest, call: Call) -> bytes:
        """Asks the trainer to stop after its step."""

        def run(tx: Tx) -> pb.StopTrainingRunResponse:
            row = training_by_id(tx.connection, request.training_run_id)
            training.stop(tx, row)
            return pb.StopTrainingRunResponse(training_run=load_training(tx.connection, row.key))

        return await change(self._store, call, request, run)

    async def report_metrics(self, request: pb.ReportMetricsRequest, call: Call) -> bytes:
        """Numbers of steps and lines; the answer tells the trainer whether it shall stop."""

        def run(tx: Tx) -> pb.ReportMetricsResponse:
            row = training.held_training(tx, request.training_run_id, request.trainer_epoch)
            training.report(tx, row, request.steps)
            training.add_log(tx, row, request.log)
            return pb.ReportMetricsResponse(training_run=load_training(tx.connection, row.key))

        return await change(self._store, call, request, run, len(request.steps) + len(request.log))

    async def watch_training_run(
        self, request: pb.WatchTrainingRunRequest, _call: Call
    ) -> AsyncIterator[pb.WatchTrainingRunResponse]:
        """State, metrics and log as they come; the stream ends with the training run."""
        if request.from_step < 0:
            raise invalid_field("from_step", "must not be negative")
        if request.after_log < 0:
            raise invalid_field("after_log", "must not be negative")
        key = (await self._store.read(lambda db: training_by_id(db, request.training_run_id))).key
        waiter = self._store.hub.add([TRAINING_RUN], refs=[key])
        last, sent = 0, b""
        lines = request.after_log if request.include_log else None
        try:
            while not self._store.hub.closed:
                answer, after = await self._store.read(partial(_news, key, last, request.from_step, lines))
                status = answer.training_run.status
                state = answer.training_run.SerializeToString(deterministic=True)
                if state == sent:
                    answer.ClearField("training_run")
                if state != sent or after != last or answer.log:
                    yield answer
                sent = state
                more = _METRICS_PAGE in (len(answer.steps), len(answer.log))
                last, lines = after, answer.log[-1].number if answer.log else lines
                if not more and status in TERMINAL:
                    return
                if not more:
                    # A wake-up is a hint only: correctness rests on looking again.
                    await waiter.wait(CHECKPOINT_SECONDS)
            raise draining()
        finally:
            self._store.hub.remove(waiter)

    async def watch_training_runs(
        self, request: pb.WatchTrainingRunsRequest, _call: Call
    ) -> AsyncIterator[pb.WatchTrainingRunsResponse | bytes]:
        """Training runs as they change."""
        if request.include_existing and request.cursor:
            raise invalid_field("cursor", "must be 0 with include_existing")
        run_key = await self._store.read(lambda db: run_key_of(db, request.run_id or "*"))

        def build(db: Connection, entries: list[LogEntry]) -> pb.WatchTrainingRunsResponse:
            keys = dict.fromkeys(entry.ref for entry in entries)
            return pb.WatchTrainingRunsResponse(training_runs=[load_training(db, key) for key in keys])

        watch = LogWatch(self._store, TRAINING_RUN, run_key, build)
        if request.include_existing:
            first = await self._store.read(lambda db: _unfinished(db, run_key))
            cursor = first.cursor
        else:
            cursor = await watch.start(request.cursor)
            first = pb.WatchTrainingRunsResponse(cursor=cursor, checkpoint=True)
        yield first
        async for found in watch.follow(cursor):
            yield found.answer or pb.WatchTrainingRunsResponse(checkpoint=True, cursor=found.cursor)


def _unfinished(db: Connection, run_key: int | None) -> pb.WatchTrainingRunsResponse:
    """Training runs that have not ended, and the position of what was read."""
    scope, values = ("TRUE", ()) if run_key is None else ("run_key = ?", (run_key,))
    ended = ",".join(str(status) for status in sorted(TERMINAL))
    rows = db.execute(
        f"SELECT training_key FROM training_runs WHERE {scope} AND status NOT IN ({ended}) "
        "ORDER BY training_key",
        values,
    ).fetchall()
    found = [load_training(db, key) for (key,) in rows]
    return pb.WatchTrainingRunsResponse(training_runs=found, cursor=position(db), checkpoint=not found)


def _news(
    key: int, last: int, from_step: int, lines: int | None, db: Connection
) -> tuple[pb.WatchTrainingRunResponse, int]:
    """The state, and the metrics and lines after the last that were sent; None = no lines."""
    steps, after = load_metrics(db, key, last, from_step, _METRICS_PAGE)
    log = [] if lines is None else load_log(db, key, lines, _METRICS_PAGE)
    return pb.WatchTrainingRunResponse(training_run=load_training(db, key), steps=steps, log=log), after

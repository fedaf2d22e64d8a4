"""Runs, pause and resume, groups."""

from __future__ import annotations

from functools import partial

from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import Order, PageRequest, check_size, fetch_page
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.handlers.common import change, mask_paths
from agl_grpc.store.rollouts import grading, lifecycle
from agl_grpc.store.rollouts.dispatch import Waiter
from agl_grpc.store.rollouts.encode import duration_of, key_values_blob, load_run, load_runs
from agl_grpc.store.rollouts.filters import run_key_of
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.catalog import QueueRow, RunRow, require_id
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import event_pb2, run_pb2, store_service_pb2

_RUN = int(event_pb2.ENTITY_KIND_RUN)
_CREATED = int(event_pb2.EVENT_KIND_CREATED)
_UPDATED = int(event_pb2.EVENT_KIND_UPDATED)
_BY_ID = Order("u.run_id", "u.run_key", descending=False)
_UPDATABLE = (
    *("metadata", "allow_self_grading", "retention", "seal_timeout", "replay_retention"),
    *("graders", "grading_timeout"),
)


class RunHandlers:
    """Serves the methods about runs and groups."""

    def __init__(self, side: WriteSide) -> None:
        self._side = side
        self._store = side.store

    async def create_run(self, request: store_service_pb2.CreateRunRequest, call: Call) -> bytes:
        """Makes a run, or answers the one that exists."""
        wanted = request.run
        require_id(wanted.run_id, "run.run_id")

        def run(tx: Tx) -> store_service_pb2.CreateRunResponse:
            row = tx.execute("SELECT run_key FROM runs WHERE run_id = ?", (wanted.run_id,)).fetchone()
            if row is not None:
                return store_service_pb2.CreateRunResponse(run=load_run(tx.connection, row[0]), created=False)
            key = tx.insert(
                "INSERT INTO runs (run_id, create_time) VALUES (?, ?) RETURNING run_key",
                (wanted.run_id, tx.now),
            )
            given = [path for path in _UPDATABLE if path == "allow_self_grading" or _is_given(wanted, path)]
            _write(tx, key, wanted, given)
            tx.event(key, _RUN, _CREATED, key)
            return store_service_pb2.CreateRunResponse(run=load_run(tx.connection, key), created=True)

        return await change(self._store, call, request, run)

    async def get_run(
        self, request: store_service_pb2.GetRunRequest, call: Call
    ) -> store_service_pb2.GetRunResponse:
        """One run."""
        call.caller.require_run(request.run_id)

        def read(db: Connection) -> run_pb2.Run:
            key = run_key_of(db, request.run_id)
            if key is None:
                raise invalid_field("run_id", "must name one run")
            return load_run(db, key)

        return store_service_pb2.GetRunResponse(run=await self._store.read(read))

    async def list_runs(
        self, request: store_service_pb2.ListRunsRequest, _call: Call
    ) -> store_service_pb2.ListRunsResponse:
        """All runs."""
        wanted = PageRequest(check_size(request.page_size), request.page_token, 0, False)

        def read(db: Connection) -> store_service_pb2.ListRunsResponse:
            page = fetch_page(db, "runs u", "TRUE", [], _BY_ID, wanted)
            runs = load_runs(db, page.keys)
            return store_service_pb2.ListRunsResponse(runs=runs, next_page_token=page.next_token)

        return await self._store.read(read)

    async def update_run(self, request: store_service_pb2.UpdateRunRequest, call: Call) -> bytes:
        """Changes a run's notes and rules."""
        paths = mask_paths(request.update_mask)

        def run(tx: Tx) -> store_service_pb2.UpdateRunResponse:
            row = self._side.catalog.run(tx, request.run.run_id)
            _write(tx, row.run_key, request.run, paths)
            if "graders" in paths:
                grading.look_again(tx, row.run_key)
            self._changed(tx, row)
            return store_service_pb2.UpdateRunResponse(run=load_run(tx.connection, row.run_key))

        return await change(self._store, call, request, run)

    async def pause_dispatch(self, request: store_service_pb2.PauseDispatchRequest, call: Call) -> bytes:
        """Stops delivery; what is leased goes on."""

        def run(tx: Tx) -> store_service_pb2.PauseDispatchResponse:
            row, queues = self._set_paused(tx, request.run_id, request.queue, paused=True)
            for waiter in self._side.dispatcher.waiting(queue.queue_key for queue in queues):
                self._tell(tx, waiter)
            return store_service_pb2.PauseDispatchResponse(run=load_run(tx.connection, row.run_key))

        return await change(self._store, call, request, run)

    async def resume_dispatch(self, request: store_service_pb2.ResumeDispatchRequest, call: Call) -> bytes:
        """Takes delivery up again and serves whoever waits."""

        def run(tx: Tx) -> store_service_pb2.ResumeDispatchResponse:
            row, queues = self._set_paused(tx, request.run_id, request.queue, paused=False)
            for waiter in self._side.dispatcher.waiting(queue.queue_key for queue in queues):
                self._side.moves.serve(tx, waiter)
                self._tell(tx, waiter)
            return store_service_pb2.ResumeDispatchResponse(run=load_run(tx.connection, row.run_key))

        return await change(self._store, call, request, run)

    def _tell(self, tx: Tx, waiter: Waiter) -> None:
        """Tells a waiter that still gets nothing why."""
        if waiter.notice is not None and waiter.credits > 0:
            tx.after_commit(partial(waiter.notice, self._side.dispatcher.idle_reason(tx, waiter)))

    def _set_paused(
        self, tx: Tx, run_id: str, queue_name: str, *, paused: bool
    ) -> tuple[RunRow, list[QueueRow]]:
        catalog = self._side.catalog
        row = catalog.run(tx, run_id)
        if queue_name:
            queue = catalog.queue(tx, row, queue_name)
            tx.execute("UPDATE queues SET paused = ? WHERE queue_key = ?", (int(paused), queue.queue_key))
            catalog.queue_changed(tx, queue)
            keys = [queue.queue_key]
        else:
            tx.execute("UPDATE runs SET paused = ? WHERE run_key = ?", (int(paused), row.run_key))
            keys = [
                key for (key,) in tx.execute("SELECT queue_key FROM queues WHERE run_key = ?", (row.run_key,))
            ]
        self._changed(tx, row)
        return row, [catalog.queue_by_key(tx, key) for key in keys]

    def _changed(self, tx: Tx, row: RunRow) -> None:
        self._side.catalog.run_changed(tx, row)
        tx.event(row.run_key, _RUN, _UPDATED, row.run_key)

    async def get_group(
        self, request: store_service_pb2.GetGroupRequest, _call: Call
    ) -> store_service_pb2.GetGroupResponse:
        """How far a group is."""
        return store_service_pb2.GetGroupResponse(
            group=await self._store.read(lambda db: _load_group(db, request.run_id, request.group_id))
        )


def _is_given(wanted: run_pb2.Run, path: str) -> bool:
    return {
        "metadata": len(wanted.metadata) > 0,
        "retention": wanted.HasField("retention"),
        "seal_timeout": wanted.HasField("seal_timeout"),
        "replay_retention": wanted.HasField("replay_retention"),
        "graders": len(wanted.graders) > 0,
        "grading_timeout": wanted.HasField("grading_timeout"),
    }[path]


def _write(tx: Tx, run_key: int, wanted: run_pb2.Run, paths: list[str]) -> None:
    for path in paths:
        if path == "metadata":
            value: object = key_values_blob(wanted.metadata)
        elif path == "allow_self_grading":
            value = int(wanted.allow_self_grading)
        elif path == "retention":
            value = duration_of(wanted.retention) if wanted.HasField("retention") else None
        elif path == "replay_retention":
            value = duration_of(wanted.replay_retention) if wanted.HasField("replay_retention") else None
        elif path == "seal_timeout":
            value = duration_of(wanted.seal_timeout) if wanted.HasField("seal_timeout") else 60_000_000
        elif path == "graders":
            value = grading.graders_blob(wanted.graders)
        elif path == "grading_timeout":
            given = wanted.HasField("grading_timeout")
            value = duration_of(wanted.grading_timeout) if given else grading.DEFAULT_TIMEOUT
        else:
            raise invalid_field("update_mask", f"may name {', '.join(_UPDATABLE)}; not {path!r}")
        tx.execute(f"UPDATE runs SET {path} = ? WHERE run_key = ?", (value, run_key))


def _load_group(db: Connection, run_id: str, group_id: str) -> run_pb2.Group:
    run_key = run_key_of(db, run_id)
    row = db.execute(
        "SELECT g.group_key, u.run_id FROM groups g JOIN runs u ON u.run_key = g.run_key "
        "WHERE g.run_key = ? AND g.group_id = ?",
        (run_key, group_id),
    ).fetchone()
    if row is None:
        raise not_found("group", group_id)
    group = run_pb2.Group(run_id=row[1], group_id=group_id)
    for rollout_id, status, sealed in db.execute(
        "SELECT rollout_id, status, sealed FROM rollouts WHERE group_key = ? ORDER BY rollout_key", (row[0],)
    ):
        group.total += 1
        group.terminal += int(status in lifecycle.ROLLOUT_TERMINAL)
        group.sealed += int(status in lifecycle.ROLLOUT_TERMINAL and bool(sealed))
        group.rollout_ids.append(rollout_id)
    return group

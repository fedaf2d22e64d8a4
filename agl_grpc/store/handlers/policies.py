"""Policy versions and engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from agl_grpc.store.clock import SECOND
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import Order, PageRequest, check_size, fetch_page
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.events.watches import LogEntry, LogWatch
from agl_grpc.store.handlers.common import change
from agl_grpc.store.rollouts.encode import duration_of
from agl_grpc.store.rollouts.filters import run_key_of
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import position
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.training import policies
from agl_grpc.store.training.policies import load_engine, load_policy
from agl_grpc.store.training.runs import held_training
from agl_grpc.v1 import policy_pb2
from agl_grpc.v1 import trainer_service_pb2 as pb

_DEFAULT_DEADLINE = 60.0


class PolicyHandlers:
    """Serves policy versions and engines."""

    def __init__(self, side: WriteSide) -> None:
        self._side = side
        self._store = side.store
        self._watching: Counter[str] = Counter()

    async def prepare_policy_version(self, request: pb.PreparePolicyVersionRequest, call: Call) -> bytes:
        """Offers weights until a deadline."""
        wanted = duration_of(request.deadline) / SECOND if request.HasField("deadline") else _DEFAULT_DEADLINE

        def run(tx: Tx) -> pb.PreparePolicyVersionResponse:
            if request.training_run_id:
                held_training(tx, request.training_run_id, request.trainer_epoch)
            run_key = self._run_key(tx, request.run_id)
            key = policies.prepare(tx, run_key, request.model, request.policy_version, request.source, wanted)
            return pb.PreparePolicyVersionResponse(policy_version=load_policy(tx.connection, key))

        return await change(self._store, call, request, run)

    async def commit_policy_version(self, request: pb.CommitPolicyVersionRequest, call: Call) -> bytes:
        """Lets engines swap weights in that all of them hold."""

        def run(tx: Tx) -> pb.CommitPolicyVersionResponse:
            row = self._policy(tx, request.run_id, request.model, request.policy_version)
            policies.commit(tx, row, request.weights_digest)
            return pb.CommitPolicyVersionResponse(policy_version=load_policy(tx.connection, row.key))

        return await change(self._store, call, request, run)

    async def abort_policy_version(self, request: pb.AbortPolicyVersionRequest, call: Call) -> bytes:
        """Gives weights up."""

        def run(tx: Tx) -> pb.AbortPolicyVersionResponse:
            row = self._policy(tx, request.run_id, request.model, request.policy_version)
            policies.abort(tx, row, request.reason or "given up by its trainer")
            return pb.AbortPolicyVersionResponse(policy_version=load_policy(tx.connection, row.key))

        return await change(self._store, call, request, run)

    async def get_policy_version(
        self, request: pb.GetPolicyVersionRequest, _call: Call
    ) -> pb.GetPolicyVersionResponse:
        """One version, or the newest committed one."""

        def read(db: Connection) -> pb.GetPolicyVersionResponse:
            run_key = _one_run(db, request.run_id)
            if request.policy_version:
                row = policies.policy_by_version(db, run_key, request.model, request.policy_version)
            else:
                found = policies.newest_committed(db, run_key, request.model)
                if found is None:
                    raise not_found("policy version", f"{request.model}/newest")
                row = found
            return pb.GetPolicyVersionResponse(policy_version=load_policy(db, row.key))

        return await self._store.read(read)

    async def list_policy_versions(
        self, request: pb.ListPolicyVersionsRequest, _call: Call
    ) -> pb.ListPolicyVersionsResponse:
        """Versions, newest first."""
        size = check_size(request.page_size)

        def read(db: Connection) -> pb.ListPolicyVersionsResponse:
            where, values = _of_model("p", _one_run(db, request.run_id), request.model)
            order = Order("p.policy_version", "p.policy_key", descending=True)
            wanted = PageRequest(size, request.page_token, 0, count=False)
            page = fetch_page(db, "policy_versions p", where, values, order, wanted)
            found = [load_policy(db, key) for key in page.keys]
            return pb.ListPolicyVersionsResponse(policy_versions=found, next_page_token=page.next_token)

        return await self._store.read(read)

    async def watch_policy_versions(
        self, request: pb.WatchPolicyVersionsRequest, _call: Call
    ) -> AsyncIterator[pb.WatchPolicyVersionsResponse | bytes]:
        """Versions as they change; an engine counts as connected as long as it watches."""
        if request.include_existing and request.cursor:
            raise invalid_field("cursor", "must be 0 with include_existing")
        run_key = await self._store.read(lambda db: _one_run(db, request.run_id))

        def build(db: Connection, entries: list[LogEntry]) -> pb.WatchPolicyVersionsResponse | None:
            found = [load_policy(db, key) for key in dict.fromkeys(entry.ref for entry in entries)]
            wanted = [version for version in found if request.model in ("", version.model)]
            return pb.WatchPolicyVersionsResponse(policy_versions=wanted) if wanted else None

        watch = LogWatch(self._store, policies.POLICY_VERSION, run_key, build, shared=request.model)
        with self._connected(request.engine_id):
            if request.include_existing:
                first = await self._store.read(lambda db: _existing(db, run_key, request.model))
                cursor = first.cursor
            else:
                cursor = await watch.start(request.cursor)
                first = pb.WatchPolicyVersionsResponse(cursor=cursor, checkpoint=True)
            yield first
            async for found in watch.follow(cursor):
                yield found.answer or pb.WatchPolicyVersionsResponse(checkpoint=True, cursor=found.cursor)

    @contextmanager
    def _connected(self, engine_id: str) -> Iterator[None]:
        if not engine_id:
            yield
            return
        self._watching[engine_id] += 1
        try:
            yield
        finally:
            self._watching[engine_id] -= 1
            if not self._watching[engine_id]:
                del self._watching[engine_id]

    async def report_engine_state(self, request: pb.ReportEngineStateRequest, call: Call) -> bytes:
        """An engine makes itself known and says how far it is."""
        if request.HasField("state") and request.state.engine_id not in ("", request.engine.engine_id):
            raise invalid_field("state.engine_id", "must be the engine's own")

        def run(tx: Tx) -> pb.ReportEngineStateResponse:
            engine = request.engine
            key = policies.put_engine(tx, self._run_key(tx, engine.run_id), engine)
            if request.HasField("state"):
                state = policy_pb2.EngineState()
                state.CopyFrom(request.state)
                state.engine_id = engine.engine_id
                row = self._policy(tx, engine.run_id, engine.model, state.policy_version)
                policies.put_state(tx, row, state)
            return pb.ReportEngineStateResponse(engine=self._engine(tx.connection, key))

        return await change(self._store, call, request, run)

    async def list_engines(self, request: pb.ListEnginesRequest, _call: Call) -> pb.ListEnginesResponse:
        """Engines of a run by id."""
        size = check_size(request.page_size)

        def read(db: Connection) -> pb.ListEnginesResponse:
            where, values = _of_model("e", _one_run(db, request.run_id), request.model)
            order = Order("e.engine_id", "e.engine_key", descending=False)
            wanted = PageRequest(size, request.page_token, 0, count=False)
            page = fetch_page(db, "engines e", where, values, order, wanted)
            found = [self._engine(db, key) for key in page.keys]
            return pb.ListEnginesResponse(engines=found, next_page_token=page.next_token)

        return await self._store.read(read)

    def _engine(self, db: Connection, key: int) -> policy_pb2.Engine:
        engine = load_engine(db, key)
        engine.connected = engine.engine_id in self._watching
        return engine

    def _run_key(self, tx: Tx, run_id: str) -> int:
        return self._side.catalog.run(tx, run_id).run_key

    def _policy(self, tx: Tx, run_id: str, model: str, version: int) -> policies.PolicyRow:
        return policies.policy_by_version(tx.connection, self._run_key(tx, run_id), model, version)


def _one_run(db: Connection, run_id: str) -> int:
    key = run_key_of(db, run_id)
    if key is None:
        raise invalid_field("run_id", "must name one run")
    return key


def _of_model(table: str, run_key: int, model: str) -> tuple[str, list[object]]:
    if not model:
        return f"{table}.run_key = ?", [run_key]
    return f"{table}.run_key = ? AND {table}.model = ?", [run_key, model]


def _existing(db: Connection, run_key: int, model: str) -> pb.WatchPolicyVersionsResponse:
    """For each model what is being prepared and the newest committed version, with the position."""
    where, values = _of_model("p", run_key, model)
    newest = (
        "SELECT max(n.policy_version) FROM policy_versions n WHERE n.run_key = p.run_key "
        f"AND n.model = p.model AND n.status = {policies.COMMITTED}"
    )
    rows = db.execute(
        f"SELECT p.policy_key FROM policy_versions p WHERE {where} AND (p.status = {policies.PREPARING} "
        f"OR (p.status = {policies.COMMITTED} AND p.policy_version = ({newest}))) ORDER BY p.policy_version",
        values,
    )
    found = [load_policy(db, key) for (key,) in rows.fetchall()]
    return pb.WatchPolicyVersionsResponse(policy_versions=found, cursor=position(db), checkpoint=not found)

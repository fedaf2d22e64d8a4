"""Workers, live leases and statistics, as an operator sees them."""

from __future__ import annotations

from agl_grpc.store.door.call import Call
from agl_grpc.store.door.paging import Order, PageRequest, check_size, fetch_page, order_of
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.handlers.common import change
from agl_grpc.store.rollouts import workers
from agl_grpc.store.rollouts.encode import set_duration
from agl_grpc.store.rollouts.filters import run_key_of
from agl_grpc.store.rollouts.names import rollout_status
from agl_grpc.store.rollouts.rows import attempts_where, find_attempts
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.spans.evict import EvictionLimits
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import oldest_position, position
from agl_grpc.store.storage.sql import LAST_TEXT, marks
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import common_pb2, store_service_pb2

_LAST = 9223372036854775807


class WorkerHandlers:
    """Serves the methods about workers, leases and statistics."""

    def __init__(self, side: WriteSide, eviction: EvictionLimits | None = None) -> None:
        self._side = side
        self._store = side.store
        self._eviction = eviction

    async def list_workers(
        self, request: store_service_pb2.ListWorkersRequest, _call: Call
    ) -> store_service_pb2.ListWorkersResponse:
        """Workers by filter."""
        scope = store_service_pb2.ListWorkersRequest()
        scope.CopyFrom(request)
        for name in ("page_size", "page_token", "skip", "include_total"):
            scope.ClearField(name)
        wanted = PageRequest(
            *(check_size(request.page_size), request.page_token, request.skip, request.include_total),
            scope=b"workers" + scope.SerializeToString(deterministic=True),
        )
        now = self._store.clock.now()
        columns = {
            "worker_id": "w.worker_id",
            "status": workers.status_sql(now),
            "current_rollout_id": _named("r.rollout_id"),
            "current_attempt_id": _named("a.attempt_id"),
        }
        for time in ("last_heartbeat_time", "last_dequeue_time", "last_busy_time", "last_idle_time"):
            columns[time] = f"coalesce(w.{time}, {_LAST})"
        order = order_of(request.order_by, request.order, columns, "w.worker_key", "worker_id")
        parts: list[str] = []
        values: list[object] = []
        if request.status_in:
            parts.append(f"{workers.status_sql(now)} IN ({marks(len(request.status_in))})")
            values += request.status_in
        if request.worker_id_contains:
            parts.append("instr(w.worker_id, ?) > 0")
            values.append(request.worker_id_contains)
        joiner = " OR " if request.logic == common_pb2.FILTER_LOGIC_OR else " AND "

        def read(db: Connection) -> store_service_pb2.ListWorkersResponse:
            page = fetch_page(db, "workers w", joiner.join(parts) or "TRUE", values, order, wanted)
            return store_service_pb2.ListWorkersResponse(
                workers=workers.load_workers(db, page.keys, now),
                next_page_token=page.next_token,
                total_size=page.total,
            )

        return await self._store.read(read)

    async def get_worker(
        self, request: store_service_pb2.GetWorkerRequest, _call: Call
    ) -> store_service_pb2.GetWorkerResponse:
        """One worker."""
        now = self._store.clock.now()

        def read(db: Connection) -> store_service_pb2.GetWorkerResponse:
            row = db.execute("SELECT worker_key FROM workers WHERE worker_id = ?", (request.worker_id,))
            found = row.fetchone()
            if found is None:
                raise not_found("worker", request.worker_id)
            return store_service_pb2.GetWorkerResponse(worker=workers.load_worker(db, found[0], now))

        return await self._store.read(read)

    async def list_leases(
        self, request: store_service_pb2.ListLeasesRequest, _call: Call
    ) -> store_service_pb2.ListLeasesResponse:
        """Live leases, oldest first."""
        wanted = PageRequest(check_size(request.page_size), request.page_token, 0, False)
        order = Order("a.attempt_key", "a.attempt_key", descending=False)

        def read(db: Connection) -> store_service_pb2.ListLeasesResponse:
            run_key = run_key_of(db, request.run_id)
            where, values = "a.lease_token IS NOT NULL", list[object]()
            if run_key is not None:
                where, values = f"{where} AND a.run_key = ?", [run_key]
            if request.worker_id:
                where += " AND a.worker_key = (SELECT worker_key FROM workers WHERE worker_id = ?)"
                values.append(request.worker_id)
            page = fetch_page(db, "attempts a", where, values, order, wanted)
            return store_service_pb2.ListLeasesResponse(
                leases=workers.lease_infos(db, page.keys), next_page_token=page.next_token
            )

        return await self._store.read(read)

    async def expire_leases(self, request: store_service_pb2.ExpireLeasesRequest, call: Call) -> bytes:
        """Ends leases now, as if they had run out."""
        if not request.attempt_ids and not request.worker_id:
            raise invalid_field("attempt_ids", "or worker_id must be given")

        def run(tx: Tx) -> store_service_pb2.ExpireLeasesResponse:
            found = find_attempts(tx.connection, request.attempt_ids)
            for attempt_id in request.attempt_ids:
                if attempt_id not in found:
                    raise not_found("attempt", attempt_id)
            chosen = list(found.values())
            if request.worker_id:
                key = tx.execute(
                    "SELECT worker_key FROM workers WHERE worker_id = ?", (request.worker_id,)
                ).fetchone()
                if key is None:
                    raise not_found("worker", request.worker_id)
                where = "WHERE worker_key = ? AND lease_token IS NOT NULL"
                chosen += attempts_where(tx.connection, where, key[0])
            once = {attempt.key: attempt for attempt in chosen}
            ended = self._side.leases.expire(tx, once.values())
            return store_service_pb2.ExpireLeasesResponse(attempt_ids=ended)

        return await change(self._store, call, request, run, 4 * len(request.attempt_ids) + 1)

    async def drain_workers(self, request: store_service_pb2.DrainWorkersRequest, call: Call) -> bytes:
        """Orders workers to leave; an order that is not yet acknowledged is not repeated."""
        if not request.worker_ids:
            raise invalid_field("worker_ids", "must name at least one worker")

        def run(tx: Tx) -> store_service_pb2.DrainWorkersResponse:
            answer = store_service_pb2.DrainWorkersResponse()
            for worker_id in dict.fromkeys(request.worker_ids):
                row = tx.execute(
                    "SELECT worker_key FROM workers WHERE worker_id = ?", (worker_id,)
                ).fetchone()
                if row is None:
                    raise not_found("worker", worker_id)
                self._side.commands.order_drain(tx, row[0], request.reason or "an operator asked for it")
                answer.worker_ids.append(worker_id)
            return answer

        return await change(self._store, call, request, run, len(request.worker_ids))

    async def get_statistics(
        self, request: store_service_pb2.GetStatisticsRequest, _call: Call
    ) -> store_service_pb2.GetStatisticsResponse:
        """Counts and sizes."""
        now = self._store.clock.now()
        database = self._store.database

        def read(db: Connection) -> store_service_pb2.GetStatisticsResponse:
            run_key = run_key_of(db, request.run_id or "*")
            answer = _count(db, run_key)
            answer.name = database.backend
            answer.database_bytes = database.size_bytes(db)
            set_duration(answer.uptime, now - self._store.start_time)
            if self._eviction is not None:
                answer.eviction_threshold_bytes = self._eviction.above
                answer.safe_threshold_bytes = self._eviction.down_to
                answer.memory_capacity_bytes = self._eviction.capacity
            return answer

        return await self._store.read(read)


def _named(column: str) -> str:
    return (
        f"coalesce((SELECT {column} FROM attempts a JOIN rollouts r ON r.rollout_key = a.rollout_key "
        f"WHERE a.attempt_key = w.current_attempt_key), {LAST_TEXT})"
    )


def _count(db: Connection, run_key: int | None) -> store_service_pb2.GetStatisticsResponse:
    scope = "" if run_key is None else f"WHERE run_key = {run_key}"
    also = "" if run_key is None else f"AND run_key = {run_key}"

    def one(sql: str) -> int:
        return int(db.execute(sql).fetchone()[0] or 0)

    answer = store_service_pb2.GetStatisticsResponse(
        total_attempts=one(f"SELECT count(*) FROM attempts {scope}"),
        total_resources=one(f"SELECT count(*) FROM resources {scope}"),
        total_workers=one("SELECT count(*) FROM workers"),
        live_leases=one(f"SELECT count(*) FROM attempts WHERE lease_token IS NOT NULL {also}"),
        open_calls=one(f"SELECT sum(open_calls) FROM attempts {scope}"),
        total_spans=one(f"SELECT sum(spans) FROM span_totals {scope}"),
        total_span_bytes=one(f"SELECT sum(bytes) FROM span_totals {scope}"),
        late_spans=one(f"SELECT sum(late) FROM span_totals {scope}"),
        evicted_attempts=one(f"SELECT count(*) FROM attempts WHERE spans_evicted = 1 {also}"),
        total_blobs=one("SELECT count(*) FROM blobs WHERE digest IS NOT NULL"),
        total_blob_bytes=one("SELECT sum(size) FROM blobs"),
        last_position=position(db),
        oldest_position=oldest_position(db),
    )
    for status, count in db.execute(f"SELECT status, count(*) FROM rollouts {scope} GROUP BY status"):
        answer.rollouts_by_status.add(status=rollout_status(status), count=count)
        answer.total_rollouts += count
    return answer

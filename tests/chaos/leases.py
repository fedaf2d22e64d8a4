"""A nemesis over leases in one process, on a clock that jumps: lost answers, workers that stop, reconnects,
restarts of the store (R8-R13).

The store, its writer and its handlers are the real ones; only the network between them and the workers is
left out, so that a million leases take minutes.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agl_grpc.store.clock import ManualClock
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.credentials import CredentialSigner
from agl_grpc.store.handlers.lease_stream import LeaseStreamHandlers
from agl_grpc.store.handlers.rollouts import RolloutHandlers
from agl_grpc.store.handlers.runner import RunnerHandlers
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.store import Store
from agl_grpc.v1 import attempt_pb2, rollout_pb2, runner_service_pb2, store_service_pb2
from tests.chaos.checker import check_leases
from tests.chaos.history import OK, History, Op
from tests.store.rig import FAILED, SUCCEEDED, seconds
from tests.support.pipes import reconcile

# Where an fsync costs nothing: that the disk keeps what it was given is proven by `kills`.
_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None
WORKERS = 8
_WAITING = 300
_BATCH = 12
_DURATION = 30
_ENDS = (attempt_pb2.ATTEMPT_STATUS_FAILED, attempt_pb2.ATTEMPT_STATUS_UNRESPONSIVE)
_ABORTED = 10
_LEASE_LOST = 9
_TWO_LEASES = (
    "SELECT rollout_key, count(*) FROM attempts WHERE lease_token IS NOT NULL GROUP BY rollout_key "
    "HAVING count(*) > 1"
)
_DEAD_LEASES = "SELECT attempt_id FROM attempts WHERE lease_token IS NOT NULL AND status NOT IN (1, 2)"
_UNFINISHED = (
    "SELECT r.rollout_id, r.status, count(a.attempt_key) FROM rollouts r LEFT JOIN attempts a ON "
    "a.rollout_key = r.rollout_key AND a.status = 3 GROUP BY r.rollout_id, r.status "
    "HAVING NOT (r.status = 4 AND count(a.attempt_key) = 1 OR r.status = 5 AND count(a.attempt_key) = 0)"
)


@dataclass(eq=False)
class Held:
    """A lease as its worker knows it.

    Attributes:
        op: Its delivery.
        token: Its secret.
        expire: Until when the worker may count on it, in seconds of the store's clock.
        ending: The worker has asked for its end.
        given_up: The worker was told that it is over.
    """

    op: Op
    token: bytes
    expire: float
    ending: bool = False
    given_up: bool = False

    def named(self) -> runner_service_pb2.HeldLease:
        """As requests name it."""
        return runner_service_pb2.HeldLease(attempt_id=self.op.attempt, lease_token=self.token)


@dataclass
class Counts:
    """What was done."""

    seed: int
    leases: int = 0
    accepted: int = 0
    refused: int = 0
    lost_answers: int = 0
    restarts: int = 0
    jumps: int = 0
    reconnects: int = 0
    rollouts: int = 0
    seconds: float = 0

    def row(self) -> dict[str, object]:
        """As a result file holds it."""
        return {**vars(self), "seconds": round(self.seconds, 1)}


class Nemesis:
    """Workers, a store and what befalls them.

    Args:
        path: The store's file.
        seed: Of all choices.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.choose = random.Random(seed)
        self.counts = Counts(seed)
        self.history = History()
        self._path = path
        self._clock = ManualClock()
        self._held: dict[str, list[Held]] = {f"w{i}": [] for i in range(WORKERS)}
        self._stopped: set[str] = set()
        self._old: deque[Held] = deque(maxlen=200)
        self._waiting = 0
        self._calls = 0
        self._over: deque[str] = deque()

    async def run(self, leases: int, tell: Callable[[int], None]) -> None:
        """Until so many leases were delivered; then everything is brought to its end and checked."""
        await self._open()
        rounds = 0
        while self.counts.leases < leases:
            await self._round()
            rounds += 1
            if rounds % 50 == 0:
                await self._check_database()
                tell(self.counts.leases)
        await self._bring_to_end()
        await self._check_database()
        self._check_over(0)
        for rollout in list(self.history.ops):
            self._check(rollout)
        unfinished = await self._store.read(lambda db: db.execute(_UNFINISHED).fetchall())
        self.history.wrong += [f"not finished exactly once: {row}" for row in unfinished]
        self._raise()
        await self._store.close()

    # One round

    async def _round(self) -> None:
        if self._waiting < _WAITING:
            await self._enqueue(200)
        things: list[Coroutine[Any, Any, None]] = []
        for worker in self._held:
            if worker in self._stopped:
                if self.choose.random() < 0.3:
                    self._stopped.discard(worker)
                continue
            if self.choose.random() < 0.05:
                self._stopped.add(worker)
                continue
            things += [self._lease(worker), self._renew(worker), self._complete(worker)]
            if self.choose.random() < 0.2:
                things.append(self._release(worker))
            if self.choose.random() < 0.3:
                things.append(self._late(worker))
        self.choose.shuffle(things)
        await asyncio.gather(*things)
        for worker in self._held:
            if self.choose.random() < 0.03:
                await self._reconnect(worker)
        await self._time_passes()
        if self.choose.random() < 0.02:
            await self._restart()
        self._check_over(2000)

    async def _time_passes(self) -> None:
        by = self.choose.uniform(0, 6)
        if self.choose.random() < 0.02:
            by = self.choose.choice((45, 3600, 100_000))
            self.counts.jumps += 1
        self._clock.advance(by)
        await self._store.timers.fire()

    async def _restart(self) -> None:
        await self._store.close()
        self.counts.restarts += 1
        now = self._now()
        self._clock.advance(self.choose.choice((0, 60, 7200)))
        for held in (one for some in self._held.values() for one in some):
            if held.expire > now:
                held.expire = self._now() + _DURATION  # R9: live leases are extended when the store starts
        await self._open()

    async def _open(self) -> None:
        self._store = await Store.open(self._path, clock=self._clock)
        side = await WriteSide.start(self._store, CredentialSigner(b"k" * 32))
        self._rollouts, self._runner = RolloutHandlers(side), RunnerHandlers(side)
        self._streams = LeaseStreamHandlers(side)

    # What workers do

    async def _enqueue(self, count: int) -> None:
        request = store_service_pb2.EnqueueRolloutsRequest(request_id=self._request_id())
        config = rollout_pb2.RolloutConfig(
            max_attempts=1000, max_redeliveries=1000, retry_condition=_ENDS, retry_backoff=seconds(0.001)
        )
        request.rollouts.extend(rollout_pb2.RolloutSpec(config=config) for _ in range(count))
        await self._ask(self._rollouts.enqueue_rollouts, request, store_service_pb2.EnqueueRolloutsResponse)
        self._waiting += count
        self.counts.rollouts += count

    async def _lease(self, worker: str) -> None:
        if len(self._held[worker]) > 3 * _BATCH:
            return
        request = runner_service_pb2.LeaseRolloutsRequest(
            request_id=self._request_id(),
            worker_id=worker,
            session_id=worker,
            limit=self.choose.randint(1, _BATCH),
            work={"lease_duration": seconds(_DURATION)},
        )
        asked, now = time.monotonic(), self._now()
        answer = await self._ask(
            self._runner.lease_rollouts, request, runner_service_pb2.LeaseRolloutsResponse, may_give_up=True
        )
        for leased in answer.rollouts if answer is not None else ():
            attempt = leased.attempt
            op = self.history.ask(
                worker, "lease", attempt.rollout_id, attempt.attempt_id, attempt.sequence_id
            )
            op.asked = asked
            self.history.answer(op, OK)
            self._held[worker].append(Held(op, leased.lease.lease_token, now + _DURATION))
            self.counts.leases += 1

    async def _renew(self, worker: str) -> None:
        some = [held for held in self._held[worker] if self.choose.random() < 0.8]
        if not some:
            return
        ops, now = [self._note("renew", held) for held in some], self._now()
        request = runner_service_pb2.RenewLeasesRequest(
            worker_id=worker, leases=[held.named() for held in some]
        )
        answer = await self._ask(self._runner.renew_leases, request, runner_service_pb2.RenewLeasesResponse)
        for held, op, renewal in zip(some, ops, answer.renewals, strict=True):
            if self._told(held, op, renewal, now):
                held.expire = now + _DURATION

    async def _complete(self, worker: str) -> None:
        some = self._take(worker, 0.4)
        if not some:
            return
        request = runner_service_pb2.CompleteAttemptsRequest(request_id=self._request_id(), worker_id=worker)
        ops, now = [], self._now()
        for held in some:
            well = self.choose.random() < 0.85
            ops.append(self._note("complete", held, "succeeded" if well else "failed"))
            request.completions.add(
                attempt_id=held.op.attempt, lease_token=held.token, status=SUCCEEDED if well else FAILED
            )
        answer = await self._ask(
            self._runner.complete_attempts, request, runner_service_pb2.CompleteAttemptsResponse
        )
        for held, op, result in zip(some, ops, answer.results, strict=True):
            if self._told(held, op, result, now) and op.detail == "succeeded":
                self._waiting -= 1
                self._over.append(op.rollout)

    async def _release(self, worker: str) -> None:
        some = self._take(worker, 0.1)
        if not some:
            return
        ops, now = [self._note("release", held) for held in some], self._now()
        request = runner_service_pb2.ReleaseAttemptsRequest(
            request_id=self._request_id(), worker_id=worker, leases=[held.named() for held in some]
        )
        answer = await self._ask(
            self._runner.release_attempts, request, runner_service_pb2.ReleaseAttemptsResponse
        )
        for held, op, result in zip(some, ops, answer.results, strict=True):
            self._told(held, op, result, now)

    async def _late(self, worker: str) -> None:
        """Writes under leases that are over: all of it must be refused."""
        some = self.choose.sample(self._old, min(4, len(self._old)))
        if not some:
            return
        ops = [self._note("complete", held, "succeeded") for held in some]
        request = runner_service_pb2.CompleteAttemptsRequest(request_id=self._request_id(), worker_id=worker)
        for held in some:
            request.completions.add(attempt_id=held.op.attempt, lease_token=held.token, status=SUCCEEDED)
        answer = await self._ask(
            self._runner.complete_attempts, request, runner_service_pb2.CompleteAttemptsResponse
        )
        for op, result in zip(ops, answer.results, strict=True):
            self._answered(op, result)
            if op.outcome == OK:
                self.history.wrong.append(
                    f"a late write was accepted: {op}\n{self.history.about(op.rollout)}"
                )

    async def _reconnect(self, worker: str) -> None:
        """Opens a stream that names some of its leases: the others go back, and dead ones are told (R12)."""
        self.counts.reconnects += 1
        kept, dropped = [], []
        for held in self._held[worker]:
            (kept if self.choose.random() < 0.7 else dropped).append(held)
        now = self._now()
        opening = runner_service_pb2.LeaseStreamOpen(
            worker_id=worker, session_id=worker, held=[held.named() for held in kept]
        )
        renewals = [self._note("renew", held) for held in kept]
        opened = await reconcile(self._streams, opening)
        for held, op in zip(kept, renewals, strict=True):
            lost = held.op.attempt in opened.lost_attempt_ids
            self.history.answer(op, f"code {_LEASE_LOST}" if lost else OK)
            self._expected(held, op, now)
            held.given_up = lost
            held.expire = now + _DURATION
        for held in dropped:
            held.given_up = True
        self._drop(worker)

    # Between a worker and the store

    async def _ask(
        self, rpc: Callable[..., Any], request: Any, answer: Any, *, may_give_up: bool = False
    ) -> Any:
        """Calls; sometimes the answer is lost, and the worker asks again, or never learns of it."""
        body = await rpc(request, Call(method=rpc.__name__))
        if self.choose.random() < 0.1:
            self.counts.lost_answers += 1
            if may_give_up and self.choose.random() < 0.5:
                return None
            again = await rpc(request, Call(method=rpc.__name__))
            if getattr(request, "request_id", "") and again != body and body:
                self.history.wrong.append(f"a repeat was answered otherwise:\n{request}")
            body = again
        return answer.FromString(body)

    def _note(self, kind: str, held: Held, detail: object = None) -> Op:
        return self.history.ask(held.op.client, kind, held.op.rollout, held.op.attempt, detail)

    def _answered(self, op: Op, result: Any) -> None:
        refused = result.HasField("error")
        self.history.answer(op, f"code {result.error.code}" if refused else OK)
        self.counts.refused += refused
        self.counts.accepted += not refused

    def _told(self, held: Held, op: Op, result: Any, asked: float) -> bool:
        """Takes the outcome for a lease; whether it was accepted."""
        self._answered(op, result)
        self._expected(held, op, asked)
        if op.outcome != OK or op.kind != "renew":
            held.given_up = True
            self._drop(held.op.client)
            if held.ending:
                self._old.append(held)
        return op.outcome == OK

    def _expected(self, held: Held, op: Op, asked: float) -> None:
        # A worker may count on its lease until it asks for its end itself.
        renewed_too_late = op.kind == "renew" and held.ending
        if op.outcome != OK and asked < held.expire and not held.given_up and not renewed_too_late:
            about = self.history.about(op.rollout)
            self.history.wrong.append(
                f"refused {held.expire - asked:.1f} s before its lease ran out: {op}\n{about}"
            )

    def _take(self, worker: str, share: float) -> list[Held]:
        """Leases that the worker lets go of now."""
        some = [held for held in self._held[worker] if self.choose.random() < share]
        self._held[worker] = [held for held in self._held[worker] if held not in some]
        for held in some:
            held.ending = True
        return some

    def _drop(self, worker: str) -> None:
        gone = [held for held in self._held[worker] if held.given_up]
        self._held[worker] = [held for held in self._held[worker] if not held.given_up]
        self._old.extend(gone)

    def _request_id(self) -> str:
        self._calls += 1
        return f"call-{self._calls}"

    def _now(self) -> float:
        return self._clock.now() / 1_000_000

    # The checks

    def _check_over(self, keep: int) -> None:
        """Checks finished rollouts and forgets them, except the newest, of which late writes may come."""
        while len(self._over) > keep:
            self._check(self._over.popleft())
        self._raise()

    def _check(self, rollout: str) -> None:
        ops = self.history.ops.pop(rollout, [])
        if ops:
            self.history.wrong += check_leases(self.history, rollout, ops)
            won = [
                op for op in ops if op.kind == "complete" and op.outcome == OK and op.detail == "succeeded"
            ]
            if len(won) > 1:
                self.history.wrong.append(f"succeeded twice: {won}")

    def _raise(self) -> None:
        wrong = self.history.wrong
        assert not wrong, f"seed {self.counts.seed}: {len(wrong)} promises broken\n" + "\n".join(wrong[:3])

    async def _check_database(self) -> None:
        for sql in (_TWO_LEASES, _DEAD_LEASES):
            found = await self._store.read(lambda db, sql=sql: db.execute(sql).fetchall())
            if found:
                self.history.wrong.append(f"{found[:5]} of: {sql}")
        self._raise()

    async def _bring_to_end(self) -> None:
        """All workers work well until nothing is left."""
        self._stopped.clear()
        while True:
            self._clock.advance(_DURATION)
            await self._store.timers.fire()
            (left,) = await self._store.read(
                lambda db: db.execute(
                    "SELECT count(*) FROM rollouts WHERE status NOT IN (4, 5, 6)"
                ).fetchone()
            )
            if not left:
                return
            for worker in self._held:
                await self._lease(worker)
                await self._complete(worker)


async def run(seed: int, leases: int, tell: Callable[[int], None] = lambda _leases: None) -> Counts:
    """So many leases under the nemesis.

    Raises:
        AssertionError: A promise was broken; says which, with the seed and the part of the history.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        nemesis = Nemesis(Path(folder, "store.db"), seed)
        await nemesis.run(leases, tell)
    nemesis.counts.seconds = time.monotonic() - begun
    return nemesis.counts

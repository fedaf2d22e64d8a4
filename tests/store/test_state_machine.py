"""The store against a small model by random walks: both must agree after every step."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agl_grpc.store.clock import SECOND, ManualClock
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.credentials import CredentialSigner
from agl_grpc.store.errors import StoreError
from agl_grpc.store.handlers.attempts import AttemptHandlers
from agl_grpc.store.handlers.lease_stream import LeaseStreamHandlers
from agl_grpc.store.handlers.rollouts import RolloutHandlers
from agl_grpc.store.handlers.runner import RunnerHandlers
from agl_grpc.store.handlers.runs import RunHandlers
from agl_grpc.store.handlers.workers import WorkerHandlers
from agl_grpc.store.rollouts.attempts import set_open_calls, signal
from agl_grpc.store.rollouts.names import attempt_status, rollout_status
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.store.verify.check import check
from agl_grpc.v1 import attempt_pb2, rollout_pb2, runner_service_pb2, store_service_pb2
from tests.store.model import OVER, Attempt, Model, Refused, Rollout
from tests.store.rig import FAILED, SUCCEEDED, TIMEOUT, UNRESPONSIVE, seconds
from tests.support.pipes import reconcile
from tests.support.postgres import PostgresServer

ALL_ENDS = [FAILED, TIMEOUT, UNRESPONSIVE]
KINDS = [0, attempt_pb2.FAILURE_KIND_INFRASTRUCTURE, attempt_pb2.FAILURE_KIND_GRADER]


class StoreMachine(RuleBasedStateMachine):
    """Every step is done to the store and to the model."""

    lend: Callable[[], AbstractContextManager[Path | str | None]] = staticmethod(nullcontext)
    rollouts = Bundle("rollouts")
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model = Model()
        self.clock = ManualClock()
        self.ids: dict[int, str] = {}
        self.tokens: dict[int, tuple[str, bytes]] = {}
        self.kept: list[object] = []
        self.last_position = 0
        self.lent = ExitStack()
        self.database = self.lent.enter_context(self.lend())
        self.runner.run(self._open())

    async def _open(self) -> None:
        self.store = await Store.open(self.database, clock=self.clock)
        self.side = await WriteSide.start(self.store, CredentialSigner(b"k" * 32))
        self.rollout_rpcs = RolloutHandlers(self.side)
        self.attempt_rpcs = AttemptHandlers(self.side)
        self.runner_rpcs = RunnerHandlers(self.side)
        self.worker_rpcs = WorkerHandlers(self.side)
        self.run_rpcs = RunHandlers(self.side)
        self.streams = LeaseStreamHandlers(self.side)

    def teardown(self) -> None:
        report = self.runner.run(self.store.read(check))
        self.runner.run(self.store.close())
        self.runner.close()
        self.lent.close()
        assert report.sound, report.broken

    def call(self, rpc: Any, request: Any, answer: Any) -> Any:
        """Calls a handler as the server would."""

        async def run() -> Any:
            return answer.FromString(await rpc(request, Call(method=rpc.__name__)))

        return self.runner.run(run())

    def remember(self, attempt: Attempt, attempt_id: str, token: bytes) -> Attempt:
        self.tokens[id(attempt)] = (attempt_id, token)
        self.kept.append(attempt)
        return attempt

    @initialize(target=rollouts)
    def begin(self) -> Any:
        return multiple(
            self.enqueue_one(1, False, 1, None, None),
            self.enqueue_one(2, True, 1, None, 8.0),
            self.enqueue_one(3, True, 0, 20.0, None),
        )

    @precondition(lambda self: len(self.model.rollouts) < 8)
    @rule(
        target=rollouts,
        attempts=st.integers(1, 3),
        retried=st.booleans(),
        redeliveries=st.integers(0, 2),
        timeout=st.sampled_from([None, 20.0]),
        silence=st.sampled_from([None, 8.0]),
        priority=st.sampled_from([0, 0, -5, 7]),
        later=st.sampled_from([None, None, 3.0]),
        patience=st.sampled_from([None, None, 40.0]),
    )
    def enqueue(
        self,
        attempts: int,
        retried: bool,
        redeliveries: int,
        timeout: float | None,
        silence: float | None,
        priority: int,
        later: float | None,
        patience: float | None,
    ) -> Rollout:
        return self.enqueue_one(attempts, retried, redeliveries, timeout, silence, priority, later, patience)

    def enqueue_one(
        self,
        attempts: int,
        retried: bool,
        redeliveries: int,
        timeout: float | None,
        silence: float | None,
        priority: int = 0,
        later: float | None = None,
        patience: float | None = None,
    ) -> Rollout:
        """Enqueues one rollout, to be delivered after `later` seconds, cancelled after `patience` seconds."""
        config = rollout_pb2.RolloutConfig(
            max_attempts=attempts,
            max_redeliveries=redeliveries,
            retry_condition=ALL_ENDS if retried else [],
            timeout=seconds(timeout) if timeout else None,
            unresponsive=seconds(silence) if silence else None,
        )
        spec = rollout_pb2.RolloutSpec(config=config, priority=priority)
        made = Rollout(attempts, retried, redeliveries, timeout, silence, priority, ready_at=self.model.now)
        if later is not None:
            spec.not_before.FromMicroseconds(self.clock.now() + int(later * SECOND))
            made.ready_at += later
        if patience is not None:
            spec.expire_after.CopyFrom(seconds(patience))
            made.patience, made.expire_at = patience, self.model.now + patience
        request = store_service_pb2.EnqueueRolloutsRequest(rollouts=[spec])
        answer = self.call(
            self.rollout_rpcs.enqueue_rollouts, request, store_service_pb2.EnqueueRolloutsResponse
        )
        return self.remember_rollout(made, answer.rollouts[0].rollout_id)

    def remember_rollout(self, made: Rollout, rollout_id: str) -> Rollout:
        self.model.rollouts.append(made)
        self.kept.append(made)
        self.ids[id(made)] = rollout_id
        return made

    @precondition(lambda self: self.model.ready())
    @rule(target=attempts, limit=st.integers(1, 3), duration=st.sampled_from([5.0, 30.0]))
    def lease(self, limit: int, duration: float) -> Any:
        request = runner_service_pb2.LeaseRolloutsRequest(
            worker_id="w", session_id="s", limit=limit, work={"lease_duration": seconds(duration)}
        )
        answer = self.call(self.runner_rpcs.lease_rollouts, request, runner_service_pb2.LeaseRolloutsResponse)
        expected = self.model.ready()[:limit]
        assert [one.rollout.rollout_id for one in answer.rollouts] == [self.ids[id(one)] for one in expected]
        made = []
        for leased, rollout in zip(answer.rollouts, expected, strict=True):
            attempt = self.model.begin(rollout, duration)
            assert leased.attempt.sequence_id == len(rollout.attempts)
            made.append(self.remember(attempt, leased.attempt.attempt_id, leased.lease.lease_token))
        return multiple(*made)

    @rule(target=attempts, kind=st.sampled_from(KINDS))
    @precondition(lambda self: self.model.ready())
    def lease_and_fail(self, kind: int) -> Any:
        before = len(self.kept)
        self.lease(1, 30.0)
        made = [one for one in self.kept[before:] if isinstance(one, Attempt)]
        for attempt in made:
            self.complete(attempt, False, kind)
        return multiple(*made)

    @precondition(lambda self: self.model.ready())
    @rule(target=attempts)
    def dequeue(self) -> Any:
        answer = self.call(
            self.rollout_rpcs.dequeue_rollouts,
            store_service_pb2.DequeueRolloutsRequest(worker_id="old"),
            store_service_pb2.DequeueRolloutsResponse,
        )
        expected = self.model.ready()[:1]
        taken = [one.rollout.rollout.rollout_id for one in answer.rollouts]
        assert taken == [self.ids[id(one)] for one in expected]
        made = [
            self.remember(self.model.begin(rollout, None), one.rollout.attempt.attempt_id, b"")
            for one, rollout in zip(answer.rollouts, expected, strict=True)
        ]
        return multiple(*made)

    @rule(target=attempts, rollout=rollouts)
    def start_attempt(self, rollout: Rollout) -> Any:
        request = store_service_pb2.StartAttemptRequest(rollout_id=self.ids[id(rollout)])
        try:
            attempt = self.model.begin(rollout, None)
        except Refused:
            with pytest.raises(StoreError, match="cannot become"):
                self.call(self.rollout_rpcs.start_attempt, request, store_service_pb2.StartAttemptResponse)
            return multiple()
        answer = self.call(self.rollout_rpcs.start_attempt, request, store_service_pb2.StartAttemptResponse)
        return self.remember(attempt, answer.rollout.attempt.attempt_id, b"")

    @rule(attempt=attempts, well=st.booleans(), kind=st.sampled_from(KINDS))
    def complete(self, attempt: Attempt, well: bool, kind: int) -> None:
        attempt_id, token = self.tokens[id(attempt)]
        request = runner_service_pb2.CompleteAttemptsRequest(worker_id="w")
        request.completions.add(
            attempt_id=attempt_id,
            lease_token=token,
            status=SUCCEEDED if well else FAILED,
            failure=None if well else attempt_pb2.Failure(kind=kind),
        )
        (result,) = self.call(
            self.runner_rpcs.complete_attempts, request, runner_service_pb2.CompleteAttemptsResponse
        ).results
        try:
            self.model.holds(attempt)
        except Refused:
            assert result.error.code == 9
            return
        assert not result.HasField("error")
        infrastructure = kind == attempt_pb2.FAILURE_KIND_INFRASTRUCTURE
        self.model.end(attempt, "succeeded" if well else "failed", infrastructure=infrastructure and not well)

    @rule(attempt=attempts)
    def release(self, attempt: Attempt) -> None:
        attempt_id, token = self.tokens[id(attempt)]
        request = runner_service_pb2.ReleaseAttemptsRequest(worker_id="w")
        request.leases.add(attempt_id=attempt_id, lease_token=token)
        (result,) = self.call(
            self.runner_rpcs.release_attempts, request, runner_service_pb2.ReleaseAttemptsResponse
        ).results
        try:
            self.model.holds(attempt)
        except Refused:
            assert result.error.code == 9
            return
        assert not result.HasField("error")
        self.model.end(attempt, "cancelled")

    @rule(attempt=attempts)
    def renew(self, attempt: Attempt) -> None:
        attempt_id, token = self.tokens[id(attempt)]
        request = runner_service_pb2.RenewLeasesRequest(worker_id="w")
        request.leases.add(attempt_id=attempt_id, lease_token=token)
        (renewal,) = self.call(
            self.runner_rpcs.renew_leases, request, runner_service_pb2.RenewLeasesResponse
        ).renewals
        try:
            self.model.renew(attempt)
        except Refused:
            assert renewal.error.code == 9
        else:
            assert renewal.duration.seconds == attempt.duration

    @rule(attempt=attempts)
    def span(self, attempt: Attempt) -> None:
        key = self.key(attempt)
        self.runner.run(self.store.write(lambda tx: signal(tx, key)))
        self.model.signal(attempt)

    @rule(attempt=attempts, calls=st.integers(0, 2))
    def open_and_close_calls(self, attempt: Attempt, calls: int) -> None:
        try:
            self.model.set_calls(attempt, calls)
        except Refused:
            return
        key = self.key(attempt)

        def run(tx: Tx) -> None:
            tx.execute("DELETE FROM open_calls WHERE attempt_key = ?", (key,))
            tx.executemany("INSERT INTO open_calls VALUES (?, ?, 0)", [(key, ref) for ref in range(calls)])
            set_open_calls(tx, key, calls)

        self.runner.run(self.store.write(run))

    @rule(attempt=attempts, status=st.sampled_from([SUCCEEDED, FAILED]))
    def update_without_lease(self, attempt: Attempt, status: int) -> None:
        attempt_id, _ = self.tokens[id(attempt)]
        request = store_service_pb2.UpdateAttemptRequest(attempt={"attempt_id": attempt_id, "status": status})
        request.update_mask.paths.append("status")
        wanted = attempt_status(status)
        allowed = not attempt.leased and (attempt.live or attempt.may_come_back)
        if not allowed and (attempt.leased or attempt.status != wanted):
            with pytest.raises(StoreError):
                self.call(self.attempt_rpcs.update_attempt, request, store_service_pb2.UpdateAttemptResponse)
            return
        self.call(self.attempt_rpcs.update_attempt, request, store_service_pb2.UpdateAttemptResponse)
        if allowed:
            self.model.end(attempt, wanted)

    @rule(rollout=rollouts)
    def cancel(self, rollout: Rollout) -> None:
        request = store_service_pb2.CancelRolloutsRequest()
        request.filter.rollout_id_in.append(self.ids[id(rollout)])
        answer = self.call(
            self.rollout_rpcs.cancel_rollouts, request, store_service_pb2.CancelRolloutsResponse
        )
        assert bool(answer.rollout_ids) == self.model.cancel(rollout)

    @precondition(lambda self: len(self.model.rollouts) < 8)
    @rule(target=rollouts, rollout=rollouts)
    def retry(self, rollout: Rollout) -> Any:
        request = store_service_pb2.RetryRolloutsRequest()
        request.filter.rollout_id_in.append(self.ids[id(rollout)])
        answer = self.call(self.rollout_rpcs.retry_rollouts, request, store_service_pb2.RetryRolloutsResponse)
        assert len(answer.rollouts) == (rollout.status in OVER)
        if not answer.rollouts:
            return multiple()
        rules = (rollout.max_attempts, rollout.retried, rollout.max_redeliveries)
        limits = (rollout.timeout, rollout.silence, rollout.priority)
        made = Rollout(*rules, *limits, ready_at=self.model.now)
        if rollout.patience is not None:  # it may wait as long as the old one
            made.patience, made.expire_at = rollout.patience, self.model.now + rollout.patience
        assert answer.rollouts[0].retry_of == self.ids[id(rollout)]
        return self.remember_rollout(made, answer.rollouts[0].rollout_id)

    @rule(chosen=st.lists(attempts, max_size=4))
    def session_comes_back(self, chosen: list[Attempt]) -> None:
        named = list({id(attempt): attempt for attempt in chosen if attempt.leased}.values())
        opening = runner_service_pb2.LeaseStreamOpen(worker_id="w", session_id="s")
        for attempt in named:
            attempt_id, token = self.tokens[id(attempt)]
            opening.held.add(attempt_id=attempt_id, lease_token=token)
        opened = self.runner.run(reconcile(self.streams, opening))
        lost, released = self.model.reconcile(named)
        assert list(opened.lost_attempt_ids) == [self.tokens[id(attempt)][0] for attempt in lost]
        assert set(opened.released_attempt_ids) == {self.tokens[id(attempt)][0] for attempt in released}

    @rule(chosen=st.lists(attempts, min_size=1, max_size=3))
    def operator_ends_leases(self, chosen: list[Attempt]) -> None:
        names = [self.tokens[id(attempt)][0] for attempt in chosen]
        request = store_service_pb2.ExpireLeasesRequest(attempt_ids=names)
        answer = self.call(self.worker_rpcs.expire_leases, request, store_service_pb2.ExpireLeasesResponse)
        live = {id(one): one for one in chosen if one.leased and one.live}
        for attempt in live.values():
            self.model.end(attempt, "unresponsive", lost=True)
        assert set(answer.attempt_ids) == {self.tokens[key][0] for key in live}

    @rule()
    def pause_or_resume(self) -> None:
        self.model.paused = not self.model.paused
        if self.model.paused:
            pause = store_service_pb2.PauseDispatchRequest(run_id="default")
            self.call(self.run_rpcs.pause_dispatch, pause, store_service_pb2.PauseDispatchResponse)
        else:
            resume = store_service_pb2.ResumeDispatchRequest(run_id="default")
            self.call(self.run_rpcs.resume_dispatch, resume, store_service_pb2.ResumeDispatchResponse)

    @precondition(lambda self: self.model.paused)
    @rule()
    def nothing_is_delivered_while_paused(self) -> None:
        request = runner_service_pb2.LeaseRolloutsRequest(worker_id="w", session_id="s", limit=5)
        answer = self.call(self.runner_rpcs.lease_rollouts, request, runner_service_pb2.LeaseRolloutsResponse)
        assert not answer.rollouts

    @precondition(lambda self: self.database is not None)
    @rule(passed=st.sampled_from([0.0, 25.0]))
    def another_server_takes_up(self, passed: float) -> None:
        async def restart() -> None:
            await self.store.close()
            self.clock.advance(passed)
            await self._open()
            await self.store.timers.fire()

        self.runner.run(restart())
        self.model.now += passed
        self.model.restart()
        self.model.advance(0)

    @rule(passed=st.sampled_from([0.5, 1.5, 6.0, 25.0, 70.0]))
    def time_passes(self, passed: float) -> None:
        self.clock.advance(passed)
        self.model.advance(passed)
        self.runner.run(self.store.timers.fire())

    def key(self, attempt: Attempt) -> int:
        """The attempt's integer key."""
        sql = "SELECT attempt_key FROM attempts WHERE attempt_id = ?"
        name = (self.tokens[id(attempt)][0],)
        return int(self.runner.run(self.store.read(lambda db: db.execute(sql, name).fetchone()[0])))

    @invariant()
    def both_agree(self) -> None:
        # What became due at this very moment happens by itself, sooner or later: now.
        self.runner.run(self.store.timers.fire())
        self.model.expire()
        rollouts, attempts, position = self.runner.run(self.store.read(_state))
        for rollout in self.model.rollouts:
            status, sealed, count, ready = rollouts[self.ids[id(rollout)]]
            assert rollout_status(status) == rollout.status
            assert bool(sealed) == rollout.sealed
            assert count == len(rollout.attempts)
            assert bool(ready) == rollout.is_ready(self.model.now)
            for attempt in rollout.attempts:
                row = attempts[self.tokens[id(attempt)][0]]
                assert attempt_status(row[0]) == attempt.status
                assert [bool(value) for value in row[1:4]] == [
                    attempt.sealed,
                    attempt.incomplete,
                    attempt.lost,
                ]
                assert bool(row[4]) == (attempt.leased and attempt.live), "a token lives as long as its lease"
        assert position >= self.last_position
        self.last_position = position


def _state(db: Any) -> tuple[dict[str, Any], dict[str, Any], int]:
    rollouts = {
        row[0]: row[1:]
        for row in db.execute("SELECT rollout_id, status, sealed, attempt_count, ready FROM rollouts")
    }
    attempts = {
        row[0]: row[1:]
        for row in db.execute(
            "SELECT attempt_id, status, sealed, capture_incomplete, lease_lost, lease_token IS NOT NULL "
            "FROM attempts"
        )
    }
    (position,) = db.execute("SELECT coalesce(max(position), 0) FROM events").fetchone()
    return rollouts, attempts, position


@contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "store.db"


def _machine(backend: str, request: pytest.FixtureRequest) -> type[StoreMachine]:
    """The machine over a back end."""
    lend = {"memory": nullcontext, "file": _file}.get(backend)
    if lend is None:
        server: PostgresServer = request.getfixturevalue("postgres")
        lend = server.lend
    return type("StoreMachine", (StoreMachine,), {"lend": staticmethod(lend)})


_EXAMPLES = {"memory": 50, "file": 10, "postgres": 5}
"""Histories unless AGL_TEST_EXAMPLES says how many; where a step costs a disk they are fewer."""


# Who says how many says that they may take their time.
@pytest.mark.timeout(0 if "AGL_TEST_EXAMPLES" in os.environ else 400)
@pytest.mark.parametrize("backend", _EXAMPLES)
def test_the_store_keeps_to_the_model(backend: str, request: pytest.FixtureRequest) -> None:
    examples = int(os.environ.get("AGL_TEST_EXAMPLES", _EXAMPLES[backend]))
    chosen_seed = int(os.environ.get("AGL_TEST_SEED", random.SystemRandom().getrandbits(32)))
    print(f"AGL_TEST_SEED={chosen_seed}")
    chosen = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(chosen_seed)(_machine(backend, request)), settings=chosen)

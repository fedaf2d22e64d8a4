"""Clients that go on through anything: they repeat a call under its request id until there is an answer."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from agl_grpc.store.errors import STATUS_TRAILER
from agl_grpc.v1 import attempt_pb2, reward_pb2, rollout_pb2, runner_service_pb2, span_pb2, store_service_pb2
from agl_grpc.v1.runner_service_pb2_grpc import RunnerServiceStub
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub
from agl_grpc.v1.trainer_service_pb2_grpc import TrainerServiceStub
from tests.chaos.history import OK, History, Op
from tests.chaos.watches import Kind
from tests.store.rig import FAILED, SUCCEEDED, error_info, held, seconds
from tests.support.store_process import RECONNECT

A = TypeVar("A", bound=Message)
LEASE_SECONDS = 1.0
_CALL_SECONDS = 3.0
_PAUSE_SECONDS = 0.02
_SILENCE_SECONDS = 30.0
_LAST_SPAN = b"\xff" * 8
_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""After these nobody knows whether the call was carried out: it is asked again."""

ENDS = (attempt_pb2.ATTEMPT_STATUS_FAILED, attempt_pb2.ATTEMPT_STATUS_UNRESPONSIVE)


def _why(error: grpc.aio.AioRpcError) -> str:
    """The store's reason, or the code of a connection that broke."""
    keys = [key for key, _ in error.trailing_metadata() or ()]
    return str(error_info(error).reason) if STATUS_TRAILER in keys else error.code().name


class Client:
    """One client with a connection of its own.

    Args:
        name: Unique.
        address: Of the store, or of a proxy before it.
        history: Where it notes what it does.
        seed: Of its choices.
    """

    def __init__(self, name: str, address: str, history: History, seed: float) -> None:
        self.name = name
        self.history = history
        self.choose = random.Random(seed)
        self.channel = grpc.aio.insecure_channel(address, options=RECONNECT)
        self.store: Any = StoreServiceStub(self.channel)
        self.runner: Any = RunnerServiceStub(self.channel)
        self.trainer: Any = TrainerServiceStub(self.channel)
        self._calls = 0

    def request_id(self) -> str:
        """A new one."""
        self._calls += 1
        return f"{self.name}-{self._calls}"

    async def surely(self, rpc: Callable[..., Any], request: Message) -> Any:
        """Calls until there is an answer; raises what the store refuses."""
        while True:
            try:
                return await rpc(request, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _LOST:
                    raise
                self.history.repeats[_why(error)] += 1
                await asyncio.sleep(_PAUSE_SECONDS)

    async def sometimes_again(self, rpc: Callable[..., Any], request: Message, first: Message) -> None:
        """Repeats an answered call now and then: the answer must be the same (R13)."""
        if self.choose.random() < 0.2:
            again = await self.surely(rpc, request)
            if again.SerializeToString() != first.SerializeToString():
                self.history.wrong.append(
                    f"{self.name}: a repeat was answered otherwise:\n{request}\n{first}\n{again}"
                )

    async def spans(self, leased: Any, *more: bytes) -> None:
        """Appends spans to an attempt, some of them twice; `more` are ids of further ones."""
        names = (leased.attempt.rollout_id, leased.attempt.attempt_id)
        spans = [
            span_pb2.Span(span_id=span_id, trace_id=b"t" * 16, name="step")
            for span_id in [os.urandom(8) for _ in range(self.choose.randint(1, 10))] + list(more)
        ]
        spans += self.choose.sample(spans, self.choose.randint(0, 1))
        request = store_service_pb2.AppendSpansRequest()
        request.groups.add(rollout_id=names[0], attempt_id=names[1], spans=spans)
        op = self.history.ask(self.name, "spans", *names, detail=tuple(span.span_id for span in spans))
        answer = await self.surely(self.store.AppendSpans, request)
        self.history.answer(op, str(answer.rejected) if answer.rejected else OK)
        if answer.rejected or answer.stored + answer.duplicates != len(spans):
            self.history.wrong.append(f"{op}: {answer}")


class Source(Client):
    """Makes rollouts and publishes resources.

    Attributes:
        rollouts: What it has enqueued.
        versions: What it has published.
    """

    def __init__(self, name: str, address: str, history: History, seed: float) -> None:
        super().__init__(name, address, history, seed)
        self.rollouts: list[str] = []
        self.versions = 0

    async def run(self, most_waiting: int, over: Callable[[], int], stop: asyncio.Event) -> None:
        """Keeps rollouts waiting until it is told to stop; `over` says how many are finished."""
        while not stop.is_set():
            if len(self.rollouts) - over() >= most_waiting:
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            await self.enqueue(self.choose.randint(1, 8))
            if self.choose.random() < 0.3:
                await self.publish()

    async def enqueue(self, count: int) -> None:
        """Enqueues some, with different rules."""
        names = [f"{self.name}-r{len(self.rollouts) + i}" for i in range(count)]
        request = store_service_pb2.EnqueueRolloutsRequest(request_id=self.request_id())
        for name in names:
            config = rollout_pb2.RolloutConfig(
                max_attempts=self.choose.randint(1, 3),
                retry_condition=ENDS,
                max_redeliveries=1000,
                retry_backoff=seconds(0.05),
            )
            request.rollouts.add(rollout_id=name, config=config)
        ops = [self.history.ask(self.name, "enqueue", name) for name in names]
        self.rollouts += names
        answer = await self.surely(self.store.EnqueueRollouts, request)
        for op in ops:
            self.history.answer(op, OK)
        await self.sometimes_again(self.store.EnqueueRollouts, request, answer)

    async def publish(self) -> None:
        """Publishes the next version of its resources."""
        request = store_service_pb2.PublishResourcesRequest(
            request_id=self.request_id(), resources_id=f"rs-{self.name}"
        )
        answer = await self.surely(self.store.PublishResources, request)
        self.versions += 1
        if answer.resources.version != self.versions:
            self.history.wrong.append(f"version {self.versions} was published as {answer.resources.version}")
        await self.sometimes_again(self.store.PublishResources, request, answer)

    def last(self) -> dict[str, str]:
        """By kind what the events of `farewell` will be about."""
        return {
            "resources": f"rs-{self.name}@{self.versions + 1}",
            "spans": _LAST_SPAN.hex(),
            "rollouts": f"{self.name}-last",
        }

    async def farewell(self) -> None:
        """A last event of each kind."""
        name = self.last()["rollouts"]
        await self.publish()
        op = self.history.ask(self.name, "enqueue", name)
        start = store_service_pb2.StartRolloutRequest(
            request_id=self.request_id(), rollout={"rollout_id": name}
        )
        started = (await self.surely(self.store.StartRollout, start)).rollout
        self.history.answer(op, OK)
        await self.spans(started, _LAST_SPAN)
        cancel = store_service_pb2.CancelRolloutsRequest(filter={"rollout_id_in": [name]})
        await self.surely(self.store.CancelRollouts, cancel)


class Worker(Client):
    """Works, and misbehaves as workers do: falls silent, comes late, hands back, vanishes.

    Attributes:
        over: Rollouts that it has brought to an end.
    """

    def __init__(self, name: str, address: str, history: History, seed: float) -> None:
        super().__init__(name, address, history, seed)
        self.over = 0
        self._naps: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Works until it is told to stop."""
        while not stop.is_set():
            for leased in await self.lease():
                await self._work(leased)
        await asyncio.gather(*self._naps)

    async def lease(self) -> list[Any]:
        """Takes work."""
        request = runner_service_pb2.LeaseRolloutsRequest(
            request_id=self.request_id(),
            worker_id=self.name,
            session_id=self.name,
            limit=self.choose.randint(1, 4),
            wait=seconds(0.1),
            work={"lease_duration": seconds(LEASE_SECONDS)},
        )
        before = self.history.ask(self.name, "lease", "")
        answer = await self.surely(self.runner.LeaseRollouts, request)
        for leased in answer.rollouts:
            attempt = leased.attempt
            op = self.history.ask(
                self.name, "lease", attempt.rollout_id, attempt.attempt_id, attempt.sequence_id
            )
            op.asked = before.asked
            self.history.answer(op, OK)
        if answer.rollouts:
            await self.sometimes_again(self.runner.LeaseRollouts, request, answer)
        return list(answer.rollouts)

    async def _work(self, leased: Any) -> None:
        await self.spans(leased)
        fate = self.choose.random()
        if fate < 0.05:
            return  # it is gone: the lease runs out
        if fate < 0.12:
            nap = asyncio.get_running_loop().create_task(self._come_late(leased))
            self._naps.add(nap)
            nap.add_done_callback(self._naps.discard)
            return
        if fate < 0.3:
            await self.renew(leased)
        if fate < 0.4:
            await self.release(leased)
        else:
            await self.complete(leased, SUCCEEDED if fate < 0.85 else FAILED)
        if self.choose.random() < 0.2:
            # Late: it must be refused, and its spans are kept.
            await self.renew(leased)
            await self.complete(leased, SUCCEEDED)
            await self.spans(leased)

    async def _come_late(self, leased: Any) -> None:
        await asyncio.sleep(LEASE_SECONDS * self.choose.uniform(1, 2))
        await self.spans(leased)
        await self.complete(leased, SUCCEEDED)

    async def renew(self, leased: Any) -> None:
        """Renews a lease."""
        op = self._asked("renew", leased)
        request = runner_service_pb2.RenewLeasesRequest(worker_id=self.name, leases=[held(leased)])
        (renewal,) = (await self.surely(self.runner.RenewLeases, request)).renewals
        self._answered(op, renewal)

    async def release(self, leased: Any) -> None:
        """Hands an attempt back."""
        op = self._asked("release", leased)
        request = runner_service_pb2.ReleaseAttemptsRequest(
            request_id=self.request_id(), worker_id=self.name, leases=[held(leased)]
        )
        answer = await self.surely(self.runner.ReleaseAttempts, request)
        self._answered(op, answer.results[0])
        await self.sometimes_again(self.runner.ReleaseAttempts, request, answer)

    async def complete(self, leased: Any, status: int) -> None:
        """Ends an attempt, with a reward."""
        op = self._asked("complete", leased, "succeeded" if status == SUCCEEDED else "failed")
        request = runner_service_pb2.CompleteAttemptsRequest(
            request_id=self.request_id(), worker_id=self.name
        )
        lease = held(leased)
        request.completions.add(
            attempt_id=lease.attempt_id,
            lease_token=lease.lease_token,
            status=status,
            rewards=[reward_pb2.Reward(value=1.0)],
        )
        answer = await self.surely(self.runner.CompleteAttempts, request)
        self._answered(op, answer.results[0])
        if op.outcome == OK and answer.results[0].rollout.HasField("end_time"):
            self.over += 1
        await self.sometimes_again(self.runner.CompleteAttempts, request, answer)

    def _asked(self, kind: str, leased: Any, detail: object = None) -> Op:
        attempt = leased.attempt
        return self.history.ask(self.name, kind, attempt.rollout_id, attempt.attempt_id, detail)

    def _answered(self, op: Op, result: Any) -> None:
        self.history.answer(op, f"code {result.error.code}" if result.HasField("error") else OK)
        if result.HasField("error") and result.error.code != grpc.StatusCode.FAILED_PRECONDITION.value[0]:
            self.history.wrong.append(f"a late write was refused as {result.error}: {op}")


class Watcher(Client):
    """Follows one kind of event through everything, with its cursor.

    Attributes:
        names: What it was told of, in order.
        ends: For rollouts, the state and the time of each end that it was told of, in order.
        last: What it waits for; None = not known yet.
    """

    def __init__(self, kind: Kind, address: str, history: History, seed: float) -> None:
        super().__init__(f"watch-{kind.name}", address, history, seed)
        self.kind = kind
        self.names: list[str] = []
        self.ends: list[tuple[str, int, int]] = []
        self.last: str | None = None
        self._cursor = 0
        self._heard: set[str] = set()

    async def run(self, start: int) -> None:
        """Follows until it has heard of `last`."""
        self._cursor = start
        while not self._done():
            call = self.kind.open(self, self._cursor)  # type: ignore[arg-type] # it has the rig's stubs
            try:
                while not self._done():
                    self._take(await asyncio.wait_for(call.read(), _SILENCE_SECONDS))
            except grpc.aio.AioRpcError as error:
                if error.code() not in _LOST:
                    info = error_info(error)
                    raise AssertionError(f"{self.name} at {self._cursor}: {error.code()} {info}") from error
                self.history.repeats[_why(error)] += 1
                await asyncio.sleep(_PAUSE_SECONDS)
            finally:
                call.cancel()

    def _done(self) -> bool:
        return self.last is not None and self.last in self._heard

    def _take(self, answer: Any) -> None:
        if answer is grpc.aio.EOF:
            raise AssertionError(f"{self.name}: the watch ended without an error")
        if answer.cursor < self._cursor:
            self.history.wrong.append(f"{self.name}: the cursor fell from {self._cursor} to {answer.cursor}")
        self._cursor = answer.cursor
        names = self.kind.seen(answer)
        self.names += names
        if self.kind.name != "rollouts":
            self._heard.update(names)
            return
        for one in answer.rollouts:
            rollout = one.rollout
            if rollout.HasField("end_time"):
                self._heard.add(rollout.rollout_id)
            if rollout.HasField("end_time") or rollout.rollout_id in self._heard:
                self.ends.append((rollout.rollout_id, rollout.status, rollout.end_time.ToNanoseconds()))

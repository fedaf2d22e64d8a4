"""A store's gRPC door for these tests: keeps what it is told, and fails on demand.

It checks what the real store checks of spans (natural key, delta bases, token lengths), so that the
interceptor is held to the contract, and it can be slow, refuse, forget and go away, which the real one
cannot be told to.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import grpc

from agl_grpc.v1 import (
    common_pb2,
    error_reason_pb2,
    policy_pb2,
    span_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
    trainer_service_pb2,
    trainer_service_pb2_grpc,
)

T = TypeVar("T")
SpanKey = tuple[str, str, bytes]


class _Store(store_service_pb2_grpc.StoreServiceServicer):
    def __init__(self, owner: ScriptedStore) -> None:
        self._owner = owner

    async def AppendSpans(
        self, request: store_service_pb2.AppendSpansRequest, context: Any
    ) -> store_service_pb2.AppendSpansResponse:
        owner = self._owner
        owner.requests.append(request)
        await asyncio.sleep(owner.delay)
        if owner.fail is not None:
            await context.abort(owner.fail, "scripted failure")
        answer = store_service_pb2.AppendSpansResponse(durability=common_pb2.DURABILITY_DISK)
        for number, group in enumerate(request.groups):
            for call in group.open_calls:
                owner.open_calls[call.span_id] = (group.rollout_id, group.attempt_id)
            for span_id in group.abandoned_calls:
                owner.abandoned.append(bytes(span_id))
                owner.open_calls.pop(span_id, None)
            for index, span in enumerate(group.spans):
                self._store(answer, group, span, number, index)
        owner.changed()
        if owner.lose_answer and any(group.spans for group in request.groups):
            owner.lose_answer = False
            await context.abort(grpc.StatusCode.UNAVAILABLE, "stored, but the answer is lost")
        return answer

    async def GetAttempt(self, request: Any, context: Any) -> Any:
        """Attempts are not in the script: whoever asks goes on without."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this store knows no attempts")

    async def WatchAttempts(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """As `GetAttempt`."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this store knows no attempts")
        yield

    def _store(self, answer: Any, group: Any, span: Any, number: int, index: int) -> None:
        owner = self._owner
        key = (group.rollout_id, group.attempt_id, bytes(span.span_id))
        owner.open_calls.pop(bytes(span.span_id), None)
        if key in owner.spans:
            answer.duplicates += 1
            owner.duplicates += 1
            return
        prompt = self._prompt(group, span)
        if prompt is None:
            rejected = answer.rejected.add(group_index=number, index=index, span_id=span.span_id)
            rejected.status.reason = error_reason_pb2.ERROR_REASON_DELTA_BASE_UNKNOWN
            rejected.status.message = "base unknown"
            return
        for choice in span.model_call.choices:
            if len(choice.token_ids) != len(choice.logprobs):
                rejected = answer.rejected.add(group_index=number, index=index, span_id=span.span_id)
                rejected.status.reason = error_reason_pb2.ERROR_REASON_TOKENS_MALFORMED
                return
        owner.deltas += bool(span.model_call.prompt.base_span_id)
        owner.spans[key] = span
        owner.prompts[key] = prompt
        answer.stored += 1

    def _prompt(self, group: Any, span: Any) -> list[int] | None:
        """The whole prompt, as readers of a store see it."""
        prompt = span.model_call.prompt
        if not prompt.base_span_id:
            return list(prompt.token_ids)
        base = (group.rollout_id, group.attempt_id, bytes(prompt.base_span_id))
        if self._owner.forgetful or base not in self._owner.spans:
            return None
        choices = {c.index: c for c in self._owner.spans[base].model_call.choices}
        sequence = self._owner.prompts[base] + list(choices[prompt.base_choice].token_ids)
        return sequence[: prompt.base_length] + list(prompt.token_ids)


class _Trainer(trainer_service_pb2_grpc.TrainerServiceServicer):
    def __init__(self, owner: ScriptedStore) -> None:
        self._owner = owner

    async def ReportEngineState(self, request: Any, context: Any) -> Any:
        self._owner.engine = request.engine
        if request.HasField("state"):
            self._owner.states.append(request.state)
        self._owner.changed()
        return trainer_service_pb2.ReportEngineStateResponse(engine=request.engine)

    async def GetPolicyVersion(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "nothing is committed")

    async def WatchPolicyVersions(self, request: Any, context: Any) -> AsyncIterator[Any]:
        queue: asyncio.Queue[policy_pb2.PolicyVersion] = asyncio.Queue()
        watcher = (request.model, queue)
        self._owner.watchers.append(watcher)
        self._owner.changed()
        try:
            while True:
                yield trainer_service_pb2.WatchPolicyVersionsResponse(policy_versions=[await queue.get()])
        finally:
            self._owner.watchers.remove(watcher)


class ScriptedStore:
    """Runs in a thread of its own; its attributes may be read from the test's thread."""

    def __init__(self) -> None:
        self.port = 0
        self.delay = 0.0
        self.fail: grpc.StatusCode | None = None
        self.lose_answer = False
        self.forgetful = False
        self.requests: list[store_service_pb2.AppendSpansRequest] = []
        self.spans: dict[SpanKey, span_pb2.Span] = {}
        self.prompts: dict[SpanKey, list[int]] = {}
        self.open_calls: dict[bytes, tuple[str, str]] = {}
        self.abandoned: list[bytes] = []
        self.duplicates = 0
        self.deltas = 0
        self.engine: policy_pb2.Engine | None = None
        self.states: list[policy_pb2.EngineState] = []
        self.watchers: list[tuple[str, asyncio.Queue[policy_pb2.PolicyVersion]]] = []
        self._condition = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-store", daemon=True)
        self._thread.start()
        self._server: grpc.aio.Server | None = None

    def __enter__(self) -> ScriptedStore:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Open the door, on the same port as before."""
        self._run(self._start())

    def stop(self) -> None:
        """Close the door at once."""
        self._run(self._stop())

    def changed(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def wait(self, condition: Callable[[], T], what: str, limit: float = 30.0) -> T:
        """The first true value of `condition`, looked at after each change."""
        until = time.monotonic() + limit
        with self._condition:
            while not (value := condition()):
                left = until - time.monotonic()
                assert left > 0, f"not seen within {limit} s: {what}"
                self._condition.wait(min(left, 0.5))
        return value

    def calls_of(self, rollout: str) -> list[tuple[span_pb2.Span, list[int]]]:
        """Spans of a rollout's model calls with their whole prompts, in order of their start."""
        found = [(span, self.prompts[key]) for key, span in list(self.spans.items()) if key[0] == rollout]
        return sorted(found, key=lambda pair: pair[0].start_time_unix_nano)

    def request_with(self, condition: Callable[[span_pb2.AttemptSpans], bool]) -> int:
        """Number of the first request with a group that meets the condition."""
        return next(
            number for number, request in enumerate(self.requests) if any(map(condition, request.groups))
        )

    def publish(self, version: policy_pb2.PolicyVersion) -> None:
        """Push a policy version to the engine that watches its model."""
        watching = self.wait(
            lambda: [queue for model, queue in self.watchers if model == version.model],
            f"an engine watching policy versions of {version.model}",
        )
        for queue in watching:
            self._loop.call_soon_threadsafe(queue.put_nowait, version)

    def state(
        self, version: int, phase: int, limit: float = 60.0, engine_id: str = ""
    ) -> policy_pb2.EngineState:
        """The engine's report of this phase of a version; of any engine where none is named."""

        def reported() -> policy_pb2.EngineState | None:
            found = [s for s in self.states if s.policy_version == version and s.phase == phase]
            return next((s for s in found if engine_id in ("", s.engine_id)), None)

        what = f"version {version} in phase {policy_pb2.EnginePhase.Name(phase)}; states: {self.states}"
        return self.wait(reported, what, limit)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        store_service_pb2_grpc.add_StoreServiceServicer_to_server(_Store(self), self._server)
        trainer_service_pb2_grpc.add_TrainerServiceServicer_to_server(_Trainer(self), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

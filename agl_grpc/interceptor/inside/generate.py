"""The wrapper around vLLM's one funnel, `engine_client.generate`: sees every call, changes none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from agl_grpc.interceptor.attribution import CURRENT, CallContext
from agl_grpc.interceptor.capture.record import (
    CallRecord,
    EngineIdentity,
    failed_record,
    note_experts,
    note_media,
    to_span,
)
from agl_grpc.interceptor.capture.retries import Retries
from agl_grpc.interceptor.capture.sink import CapturedCall
from agl_grpc.interceptor.capture.versions import ServedWeights, runs_from_starts
from agl_grpc.interceptor.inside import engine_state
from agl_grpc.interceptor.inside.held import HeldAnswer
from agl_grpc.interceptor.inside.resume import AbortResumer
from agl_grpc.interceptor.inside.sampling import capture_params
from agl_grpc.interceptor.sampling import sampling_message, untrainable_reasons
from agl_grpc.v1 import common_pb2, model_call_pb2

logger = logging.getLogger("agl_grpc.interceptor")

OutputStream = AsyncGenerator[Any, None]

_BEAM = "-beam-"
"""Stands in the engine's request ids of vLLM's beam search, before the number of the beam."""


class Sink(Protocol):
    """Where captured calls go."""

    def announce(self, attempt: tuple[str, str], span_id: bytes, started: int) -> None:
        """A call begins."""
        ...

    def abandon(self, span_id: bytes) -> None:
        """An announced call ended without a span."""
        ...

    def submit(self, call: CapturedCall) -> asyncio.Future[None]:
        """A call ended; its future resolves when it is durable."""
        ...


@dataclass
class _OpenCall:
    """A call under way: its record, its sequences by index, and where each changed its policy version."""

    record: CallRecord
    tables_asked: bool
    states: dict[int, Any] = field(default_factory=dict)
    starts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    ends: dict[int, tuple[str, str]] = field(default_factory=dict)
    experts: dict[int, Any] = field(default_factory=dict)
    failure: str = ""


class GenerateWrapper:
    """Replaces `generate` of an engine client by a capturing one that behaves the same.

    `refuse` builds the exception by which vLLM answers 400, `fail` the one for an answer that the engine
    aborted for good; `resume_timeout` seconds is how long such an abort may last. `record_external` takes
    ended calls that name no attempt, with their session. `adapters` are served under names of their own, each
    with versions of its own, which begin at 0; `policy_version` is the model's.
    """

    def __init__(
        self,
        engine_client: Any,
        sink: Sink,
        identity: EngineIdentity,
        *,
        policy_version: int,
        temperature: float | None,
        refuse: Callable[[str], Exception],
        fail: Callable[[str], Exception],
        resume_timeout: float,
        record_external: Callable[[str, CapturedCall], None] | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        self._record_external = record_external
        self._client = engine_client
        self._sink = sink
        self._identity = identity
        self._served = ServedWeights(identity.model, policy_version, adapters)
        self._temperature = temperature
        self._refuse = refuse
        self._fail = fail
        self._resumer = AbortResumer(engine_client, resume_timeout)
        self._retries = Retries()
        self._generate: Callable[..., OutputStream] = engine_client.generate
        self._update_weight_version = getattr(engine_client, "update_weight_version", None)
        self._open: dict[str, _OpenCall] = {}
        self._one_ended = asyncio.Event()
        self.captured = 0
        self.retries = 0
        self.unattributed = 0

    @property
    def policy_version(self) -> int:
        """The version whose weights sample now; of the model itself where adapters are served."""
        return self.version_of(self._identity.model)

    def version_of(self, model: str) -> int:
        """The version that samples under a name."""
        return self._served.of(model)[0]

    @property
    def resumed(self) -> int:
        """How often a sequence was continued after an abort by the engine."""
        return self._resumer.resumed

    def install(self) -> None:
        """Put the wrapper in place, on this one engine client."""
        self._client.generate = self.generate
        self._client.update_weight_version = self.update_weight_version
        engine_state.watch_requests(self._client.output_processor, self._on_sequence)
        self._resumer.install()

    async def name_weights(self) -> None:
        """Tell the engine which weights serve."""
        await self.update_weight_version(self._served.label())

    async def update_weight_version(self, new_version: str) -> None:
        """As `AsyncLLM.update_weight_version`, which vLLM has from 0.29: whoever else changes the weights,
        as a server that verl has started, calls it while generation is paused.
        """
        if self._update_weight_version is not None:
            await self._update_weight_version(new_version)
        if new_version.isdigit() and int(new_version) != self.policy_version:
            self.set_policy_version(int(new_version), "")

    def set_policy_version(self, version: int, weights_digest: str, adapter: str = "") -> None:
        """Note, while generation is paused, that tokens from here on are sampled by other weights.

        Those of an adapter, where one is named: other calls are not touched.
        """
        self._served.change(adapter or self._identity.model, version, weights_digest)
        for call in self._open.values():
            if adapter in ("", call.record.model):
                for index, state in call.states.items():
                    call.starts[index].append((version, engine_state.tokens_so_far(state)))

    def under_way(self, adapter: str = "") -> int:
        """How many calls of attempts run (under this adapter; empty: all)."""
        return len(self._of_attempts(adapter))

    async def drained(self, limit: float, adapter: str = "") -> bool:
        """Wait until no such call runs, for at most `limit` seconds; whether that came about."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while self._of_attempts(adapter):
                    self._one_ended.clear()
                    await self._one_ended.wait()
        return not self._of_attempts(adapter)

    def cut(self, reason: str, adapter: str = "") -> int:
        """End such calls as errors, recorded as cut; how many. One without a token yet goes on."""
        chosen = [
            call
            for call in self._of_attempts(adapter)
            if any(engine_state.tokens_so_far(state) for state in call.states.values())
        ]
        for call in chosen:
            for state in call.states.values():
                self._resumer.end(state, reason)
        return len(chosen)

    def _of_attempts(self, adapter: str) -> list[_OpenCall]:
        running = [call for call in self._open.values() if call.record.context.external is None]
        return [call for call in running if adapter in ("", call.record.model)]

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> OutputStream:
        """As `AsyncLLM.generate`. Whose call it is is read here, not when the first output is asked for."""
        context = CURRENT.get()
        if context is None:
            self.unattributed += 1
            return self._generate(prompt, sampling_params, request_id, *args, **kwargs)
        lora = kwargs.get("lora_request")
        model = lora.lora_name if lora is not None else self._identity.model
        if _BEAM in request_id:
            self._note_beam(context, prompt, sampling_params, request_id, model)
            found = self._generate(prompt, sampling_params, request_id, *args, **kwargs)
            return found if context.answer is None else _spending(context.answer, found)
        imposed = self._imposed(context, model)
        if context.known is not None and sampling_params.seed is None and "seed" not in imposed:
            imposed.update(context.known.next_seed())
        params = capture_params(sampling_params, imposed)
        call = self._begin(context, prompt, params, sampling_params, request_id, model)
        return self._capture(call, self._generate(prompt, params, request_id, *args, **kwargs))

    def _note_beam(self, context: CallContext, prompt: Any, params: Any, request_id: str, model: str) -> None:
        """Beam search asks the engine for each token of each beam by itself: all of them are one record."""
        answer = context.answer
        if context.attribution.mode == "train" and context.external is None:
            raise self._refuse(
                "beam search cannot be trained: use n with temperature, or the /mode/val base URL"
            )
        name = request_id.rpartition(_BEAM)[0].rpartition("-")[0]
        if answer is None or not answer.first_of(name):
            return
        record = CallRecord(context, name, model, sampling_message(params, params))
        record.untrainable("beam search: its tokens are searched for, not sampled")
        record.prompt_ids = list(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else []
        if context.external is None:
            attempt = (context.attribution.rollout_id, context.attribution.attempt_id)
            self._sink.announce(attempt, record.span_id, record.started)
        self.captured += 1
        # It goes to the sink with the end of the answer, by which its outcome is known.
        answer.begun()
        answer.ended(record, self._submit_beam)

    def _submit_beam(self, record: CallRecord) -> asyncio.Future[None] | None:
        record.end()
        if record.context.answer is not None and not record.context.answer.complete:
            record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_CUT
        return self._submit(record)

    def _imposed(self, context: CallContext, model: str) -> dict[str, Any]:
        """What the resource of the attempt says of sampling in this mode; in training the operator's word."""
        known, mode = context.known, context.attribution.mode
        imposed = {} if known is None else known.sampling(model, mode)
        if self._temperature is not None and mode == "train" and context.external is None:
            imposed["temperature"] = self._temperature
        return imposed

    def _begin(
        self, context: CallContext, prompt: Any, params: Any, asked: Any, request_id: str, model: str
    ) -> _OpenCall:
        attribution = context.attribution
        record = CallRecord(context, request_id, model, sampling_message(params, asked))
        for reason in untrainable_reasons(params):
            record.untrainable(reason)
        if attribution.notrain:
            record.untrainable("the agent asked for /notrain")
        if isinstance(prompt, dict):
            record.cache_salt = prompt.get("cache_salt") or ""
            if prompt.get("mm_kwargs"):
                record.untrainable("multimodal prompt: only its token ids are captured")
                note_media(record, prompt.get("mm_hashes") or {})
        call = self._open[request_id] = _OpenCall(record, asked.logprobs is not None)
        number = 0 if context.answer is None else context.answer.begun()
        if context.external is None:
            attempt = (attribution.rollout_id, attribution.attempt_id)
            self._sink.announce(attempt, record.span_id, record.started)
            if context.answer is not None:
                digest = hash((context.answer.digest(), number))
                self.retries += self._retries.mark(record, attempt, digest, context.answer.tries)
        return call

    def failed(
        self, context: CallContext, status: int, reason: str, raw: common_pb2.Payload | None
    ) -> asyncio.Future[None]:
        """Record a request that the server has answered with an error before it reached the engine.

        What it answers resolves when the record is durable.
        """
        record = failed_record(context, self._identity.model, status, reason, raw)
        attempt = (context.attribution.rollout_id, context.attribution.attempt_id)
        span = to_span(record, self._identity)
        return self._sink.submit(CapturedCall(attempt, span, [], {}))

    def _on_sequence(self, request_id: str, state: Any, request: Any) -> None:
        call = self._open.get(request_id)
        if call is not None:
            self._guard(call, self._watch, state, request)

    def _watch(self, call: _OpenCall, state: Any, request: Any) -> None:
        def fail(reason: str) -> None:
            call.failure = call.failure or reason

        call.states[state.request_index] = state
        call.starts[state.request_index] = [(self.version_of(call.record.model), 0)]
        if not call.tables_asked:
            engine_state.keep_sampled_logprobs(state)
        self._resumer.track(state, request, fail)

    async def _capture(self, call: _OpenCall, outputs: OutputStream) -> OutputStream:
        """Pass outputs on as they come; the end of the answer is held where it leaves (see `held`)."""
        record = call.record
        ended = False
        try:
            async for output in outputs:
                for each in output.outputs:
                    if each.finish_reason is not None:
                        self._guard(call, self._take_end, each)
                if output.finished:
                    self._guard(call, self._take_timings, output.metrics)
                    ended = True
                    self._finish(call)
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            if not ended:
                record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_CUT
            self._lost(record)
            raise
        except Exception as error:
            if call.failure:
                record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_CUT
                record.error = call.failure
                raise self._fail(call.failure) from error
            record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_ERROR
            record.error = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            raise
        finally:
            await outputs.aclose()
            if not ended:
                self._finish(call)

    def _lost(self, record: CallRecord) -> None:
        """Its client did not wait for the end: an equal call after it repeats it."""
        attribution = record.context.attribution
        self._retries.lost((attribution.rollout_id, attribution.attempt_id), record.span_id)

    @staticmethod
    def _guard(call: _OpenCall, step: Callable[..., None], *args: Any) -> None:
        """Run a step of the capture; its failure must cost the record, never the agent's answer."""
        try:
            step(call, *args)
        except Exception as error:  # an engine that differs from the supported one may break in any way
            logger.exception("capture of request %s failed", call.record.request_id)
            call.record.untrainable(f"capture failed: {type(error).__name__}")

    @staticmethod
    def _take_end(call: _OpenCall, choice: Any) -> None:
        stop = "" if choice.stop_reason is None else str(choice.stop_reason)
        call.ends[choice.index] = (choice.finish_reason, stop)
        call.experts[choice.index] = getattr(choice, "routed_experts", None)

    @staticmethod
    def _take_timings(call: _OpenCall, stats: Any) -> None:
        if stats is not None:
            call.record.queue_ns = max(0, int((stats.scheduled_ts - stats.queued_ts) * 1e9))
            call.record.first_token_ns = int(stats.first_token_latency * 1e9)

    def _finish(self, call: _OpenCall) -> None:
        """Complete the record; it goes to the sink with the end of its answer."""
        record = call.record
        answer = record.context.answer
        record.end()
        self._open.pop(record.request_id, None)
        self._one_ended.set()
        if not call.states:
            # Refused before it reached the engine: there are no tokens to keep.
            self._sink.abandon(record.span_id)
            if answer is not None:
                answer.abandoned()
            return
        for index, state in call.states.items():
            self._resumer.forget(state)
            self._guard(call, self._complete_choice, index, state)
        _, record.weights_digest = self._served.of(record.model)
        if record.outcome == model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE and any(
            choice.finish_reason == "abort" for choice in record.choices.values()
        ):
            record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_CUT
        self.captured += 1
        if answer is None:
            self._submit(record)
        else:
            answer.ended(record, self._submit)

    def _submit(self, record: CallRecord) -> asyncio.Future[None] | None:
        """Hand a record over; what resolves when it is durable, None where the answer waits for nothing."""
        attribution, session = record.context.attribution, record.context.external
        attempt, span = (attribution.rollout_id, attribution.attempt_id), to_span(record, self._identity)
        captured = CapturedCall(attempt, span, record.prompt_ids, record.responses())
        if session is None:
            return self._sink.submit(captured)
        if self._record_external is not None:
            self._record_external(session, captured)
        return None

    @staticmethod
    def _complete_choice(call: _OpenCall, index: int, state: Any) -> None:
        """The choice from its sequence's state: ids, logprobs, end, and versions by two accounts."""
        record = call.record
        record.prompt_ids = record.prompt_ids or list(state.prompt_token_ids or ())
        choice = record.choices[index] = engine_state.snapshot(state)
        choice.finish_reason, choice.stop_reason = call.ends.get(index, ("abort", ""))
        note_experts(record, choice, call.experts.get(index))
        own = runs_from_starts(call.starts[index], len(choice.token_ids))
        if choice.runs and choice.runs != own:
            record.untrainable(f"policy versions disagree: engine {choice.runs}, interceptor {own}")
        choice.runs = choice.runs or own
        if len(choice.logprobs) != len(choice.token_ids):
            del record.choices[index]
            record.untrainable(f"the engine gave no logprobs for choice {index}")


async def _spending(answer: HeldAnswer, outputs: OutputStream) -> OutputStream:
    """Pass outputs on and count what they sample, of which no record is kept."""
    try:
        async for output in outputs:
            if output.finished:
                answer.spent(sum(len(each.token_ids) for each in output.outputs))
            yield output
    finally:
        await outputs.aclose()

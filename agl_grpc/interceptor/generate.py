"""The wrapper around vLLM's one funnel, `engine_client.generate`: sees every call, changes none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Protocol

from agl_grpc.interceptor import engine_state
from agl_grpc.interceptor.attribution import CURRENT, CallContext
from agl_grpc.interceptor.record import CallRecord, EngineIdentity, to_span
from agl_grpc.interceptor.sampling import capture_params, sampling_message, untrainable_reasons
from agl_grpc.interceptor.versions import runs_from_engine, runs_from_starts
from agl_grpc.v1 import model_call_pb2, span_pb2

logger = logging.getLogger("agl_grpc.interceptor")

OutputStream = AsyncGenerator[Any, None]


class Sink(Protocol):
    """Where captured calls go."""

    def announce(self, attempt: tuple[str, str], span_id: bytes, started: int) -> None:
        """A call begins."""
        ...

    def abandon(self, span_id: bytes) -> None:
        """An announced call ended without a span."""
        ...

    def submit(
        self, attempt: tuple[str, str], span: span_pb2.Span, prompt: list[int]
    ) -> asyncio.Future[None]:
        """A call ended; the future resolves when it is durable."""
        ...


class GenerateWrapper:
    """Replaces `generate` and `abort` of an engine client by capturing ones that behave the same.

    `refuse` builds the exception by which vLLM answers 400.
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
    ) -> None:
        self._client = engine_client
        self._sink = sink
        self._identity = identity
        self._policy_version = policy_version
        self._weights_digest = ""
        self._temperature = temperature
        self._refuse = refuse
        self._generate: Callable[..., OutputStream] = engine_client.generate
        self._abort = engine_client.abort
        self._open: dict[str, CallRecord] = {}
        self._starts: dict[str, dict[int, list[tuple[int, int]]]] = {}
        self.captured = 0
        self.unattributed = 0

    @property
    def policy_version(self) -> int:
        """The version whose weights sample now."""
        return self._policy_version

    def install(self) -> None:
        """Put the wrapper in place, on this one engine client."""
        self._client.generate = self.generate
        self._client.abort = self.abort

    def set_policy_version(self, version: int, weights_digest: str) -> None:
        """Note, while generation is paused, that tokens from here on are sampled by other weights."""
        self._policy_version = version
        self._weights_digest = weights_digest
        for request_id in self._open:
            for state in engine_state.request_states(self._client.output_processor, request_id):
                index, tokens = engine_state.progress(state)
                self._starts[request_id].setdefault(index, []).append((version, tokens))

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> OutputStream:
        """As `AsyncLLM.generate`. Whose call it is is read here, not when the first output is asked for."""
        context = CURRENT.get()
        if context is None:
            self.unattributed += 1
            return self._generate(prompt, sampling_params, request_id, *args, **kwargs)
        if "-beam-" in request_id:
            if context.attribution.mode == "train":
                raise self._refuse(
                    "beam search cannot be trained: use n with temperature, or the /mode/val base URL"
                )
            self.unattributed += 1
            return self._generate(prompt, sampling_params, request_id, *args, **kwargs)
        override = self._temperature if context.attribution.mode == "train" else None
        params = capture_params(sampling_params, override)
        record = self._begin(context, prompt, params, sampling_params, request_id, kwargs.get("lora_request"))
        return self._capture(record, self._generate(prompt, params, request_id, *args, **kwargs), params)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """As `AsyncLLM.abort`; notes first what the calls have sampled, which is gone afterwards."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        processor = self._client.output_processor
        for external in set(engine_state.external_ids(processor, ids, internal)):
            if external in self._open:
                self._guard(self._open[external], self._snapshot)
        await self._abort(ids, internal)

    def _begin(
        self, context: CallContext, prompt: Any, params: Any, asked: Any, request_id: str, lora: Any
    ) -> CallRecord:
        attribution = context.attribution
        model = lora.lora_name if lora is not None else self._identity.model
        record = CallRecord(context, request_id, model, sampling_message(params, asked))
        for reason in untrainable_reasons(params):
            record.untrainable(reason)
        if attribution.notrain:
            record.untrainable("the agent asked for /notrain")
        if isinstance(prompt, dict):
            record.cache_salt = prompt.get("cache_salt") or ""
            if prompt.get("mm_kwargs"):
                record.untrainable("multimodal prompt: only its token ids are captured")
        self._starts[request_id] = {}
        self._open[request_id] = record
        record.start_version = self._policy_version
        self._sink.announce((attribution.rollout_id, attribution.attempt_id), record.span_id, record.started)
        return record

    async def _capture(self, record: CallRecord, outputs: OutputStream, params: Any) -> OutputStream:
        """Pass outputs on as they come; the last one when the call is durable, unless it is the first."""
        delta = params.output_kind.name == "DELTA"
        passed = 0
        submitted = False
        try:
            async for output in outputs:
                self._guard(record, self._take, output, delta)
                if output.finished:
                    durable = self._finish(record)
                    submitted = True
                    if passed:
                        await asyncio.wait([durable])
                passed += 1
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_CUT
            raise
        except Exception as error:
            record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_ERROR
            record.error = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            raise
        finally:
            # Closing the engine's stream aborts an unfinished request, which takes the snapshot.
            await outputs.aclose()
            if not submitted:
                self._finish(record)

    @staticmethod
    def _guard(record: CallRecord, step: Callable[..., None], *args: Any) -> None:
        """Run a step of the capture; its failure must cost the record, never the agent's answer."""
        try:
            step(record, *args)
        except Exception as error:  # an engine that differs from the supported one may break in any way
            logger.exception("capture of request %s failed", record.request_id)
            record.untrainable(f"capture failed: {type(error).__name__}")

    def _take(self, record: CallRecord, output: Any, delta: bool) -> None:
        if output.prompt_token_ids and not record.prompt_ids:
            record.prompt_ids = output.prompt_token_ids
        for each in output.outputs:
            self._take_choice(record, each, delta)
        stats = output.metrics
        if stats is not None:
            record.queue_ns = max(0, int((stats.scheduled_ts - stats.queued_ts) * 1e9))
            record.first_token_ns = int(stats.first_token_latency * 1e9)

    def _take_choice(self, record: CallRecord, output: Any, delta: bool) -> None:
        choice = record.choice(output.index)
        tokens = list(output.token_ids)
        logprobs = engine_state.sampled_logprobs(output.logprobs, tokens)
        if delta:
            choice.token_ids += tokens
            choice.logprobs += logprobs
        else:
            choice.token_ids, choice.logprobs = tokens, logprobs
        if output.finish_reason is not None:
            choice.finish_reason = output.finish_reason
            choice.stop_reason = "" if output.stop_reason is None else str(output.stop_reason)
            spans = getattr(output, "weight_versions", None)
            if spans is not None:
                starts = [(span.version, span.start) for span in spans]
                choice.runs = runs_from_engine(starts, len(choice.token_ids)) or []

    def _snapshot(self, record: CallRecord) -> None:
        """Replace what was passed on by what was sampled."""
        for state in engine_state.request_states(self._client.output_processor, record.request_id):
            for output in engine_state.finished_siblings(state):
                self._take_choice(record, output, delta=False)
            choice = engine_state.snapshot(state)
            record.choices[choice.index] = choice
            record.prompt_ids = record.prompt_ids or list(state.prompt_token_ids or [])

    def _finish(self, record: CallRecord) -> asyncio.Future[None]:
        """Complete the record and hand it to the sink."""
        record.end()
        self._open.pop(record.request_id, None)
        starts = self._starts.pop(record.request_id, {})
        for choice in record.choices.values():
            self._settle_runs(record, choice, starts.get(choice.index, []))
        record.weights_digest = self._weights_digest
        self._note_outcome(record)
        if not record.prompt_ids and not record.choices:
            # Refused before it reached the engine: there are no tokens to keep.
            self._sink.abandon(record.span_id)
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        self.captured += 1
        attribution = record.context.attribution
        durable = self._sink.submit(
            (attribution.rollout_id, attribution.attempt_id),
            to_span(record, self._identity),
            record.prompt_ids,
        )
        record.context.durable.append(durable)
        return durable

    def _settle_runs(self, record: CallRecord, choice: Any, starts: list[tuple[int, int]]) -> None:
        """Our own account of versions; the engine's, where it gives one, must say the same."""
        own = runs_from_starts([(record.start_version, 0), *starts], len(choice.token_ids))
        if choice.runs and choice.runs != own:
            record.untrainable(f"policy versions disagree: engine {choice.runs}, interceptor {own}")
        choice.runs = choice.runs or own
        if len(choice.logprobs) != len(choice.token_ids):
            record.untrainable("the engine gave no logprobs")
            choice.logprobs = []

    @staticmethod
    def _note_outcome(record: CallRecord) -> None:
        aborted = [c for c in record.choices.values() if c.finish_reason == "abort" or not c.finish_reason]
        if record.outcome == model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE and aborted:
            record.outcome = model_call_pb2.MODEL_CALL_OUTCOME_CUT
        for choice in aborted:
            choice.finish_reason = "abort"

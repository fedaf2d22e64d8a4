"""The record of one request: announced when it begins, completed and made durable when it ends."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable
from typing import Any

from agl_grpc.interceptor.attribution import CallContext
from agl_grpc.interceptor.capture.deltas import AttemptKey
from agl_grpc.interceptor.capture.raw import raw_payload
from agl_grpc.interceptor.capture.record import CallRecord, EngineIdentity, to_span
from agl_grpc.interceptor.capture.sink import CapturedCall
from agl_grpc.interceptor.capture.versions import VersionRun
from agl_grpc.interceptor.front.dialects import Collector
from agl_grpc.interceptor.front.upstreams import Upstream
from agl_grpc.v1 import model_call_pb2

COMPLETE = model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE
CUT = model_call_pb2.MODEL_CALL_OUTCOME_CUT
ERROR = model_call_pb2.MODEL_CALL_OUTCOME_ERROR

_SEMANTICS = {
    "raw": model_call_pb2.LOGPROB_SEMANTICS_RAW,
    "processed": model_call_pb2.LOGPROB_SEMANTICS_PROCESSED,
}

Submit = Callable[[CapturedCall], "asyncio.Future[None]"]
Version = tuple[int, str]


class Capture:
    """The records of one request, one for each of its prompts.

    Args:
        context: whose call it is.
        model: as the request names it.
        sampling: in force, as far as it is known.
        reasons: why the call cannot be trained.
        prompts: how many prompts the request has.
        n: answers to each of them.
        submit: takes a finished record.
        version: the policy version in force now.
    """

    def __init__(
        self,
        context: CallContext,
        model: str,
        sampling: model_call_pb2.SamplingParameters,
        reasons: list[str],
        *,
        prompts: int,
        n: int,
        submit: Submit,
        version: Callable[[], Version],
    ) -> None:
        self._n = n
        self._submit = submit
        self._version = version
        self._began_with = version()
        self._done = False
        self.records = [CallRecord(context, "", model, sampling) for _ in range(prompts)]
        for record in self.records:
            for reason in reasons:
                record.untrainable(reason)
        self._durable: list[asyncio.Future[None]] = []
        self.raw_request = b""
        self.tokens = 0

    @property
    def attempt(self) -> AttemptKey:
        """Whose call it is."""
        attribution = self.records[0].context.attribution
        return attribution.rollout_id, attribution.attempt_id

    def pack_request(self) -> None:
        """Compress the request for its record."""
        if self.raw_request:
            self.records[0].raw_request = raw_payload(self.raw_request)
            self.raw_request = b""

    def first_token(self) -> None:
        """Note the time of the first token."""
        for record in self.records:
            record.first_token_ns = record.first_token_ns or time.monotonic_ns() - record.began

    def untrainable(self, reason: str) -> None:
        """Note why the call must not be trained."""
        for record in self.records:
            record.untrainable(reason)

    def finish(
        self,
        outcome: int,
        collector: Collector | None,
        engine: Upstream | None,
        *,
        error: str = "",
        raw_response: bytes = b"",
        media_type: str = "application/json",
        logprobs_mode: str = "unknown",
    ) -> None:
        """Complete the records and hand them on; a second call changes nothing."""
        if self._done:
            return
        self._done = True
        if collector is not None:
            collector.read_prompts()
        identity = EngineIdentity(
            engine.engine_id if engine else "", engine.version if engine else "", self.records[0].model, False
        )
        for number, record in enumerate(self.records):
            record.end()
            record.outcome = outcome
            record.error = error[:500]
            if collector is not None:
                self._complete(record, number, collector)
            if number == 0:
                self.pack_request()
                record.raw_response = raw_payload(raw_response, media_type)
            span = to_span(record, identity)
            span.model_call.logprob_semantics = self._semantics(record, logprobs_mode)
            prompt = collector.prompts.get(number, array("I")) if collector else array("I")
            self._durable.append(self._submit(CapturedCall(self.attempt, span, prompt, record.responses())))

    async def kept(self) -> None:
        """Wait until all records that have been handed on are durable."""
        for durable in self._durable:
            await durable

    def _complete(self, record: CallRecord, number: int, collector: Collector) -> None:
        record.request_id = collector.answer_id
        record.model = collector.model or record.model
        prompt = collector.prompts.get(number, ())
        for problem in collector.problems:
            record.untrainable(problem)
        for index, choice in collector.choices.items():
            if index // self._n == number:
                choice.index = index % self._n
                record.choices[choice.index] = choice
        self.tokens = self.tokens or collector.total_tokens
        for choice in list(record.choices.values()):
            if len(choice.logprobs) != len(choice.token_ids):
                del record.choices[choice.index]
                record.untrainable(
                    f"choice {choice.index} came with {len(choice.token_ids)} token ids "
                    f"and {len(choice.logprobs)} logprobs"
                )
        self._check_ids(record, len(prompt))
        self._stamp(record)
        if not collector.total_tokens:
            self.tokens += len(prompt) + sum(len(c.token_ids) for c in record.choices.values())

    @staticmethod
    def _check_ids(record: CallRecord, prompt: int) -> None:
        sampled = any(choice.token_ids for choice in record.choices.values())
        if record.outcome == COMPLETE and not (sampled and prompt):
            record.untrainable("no token ids came with the answer")

    def _stamp(self, record: CallRecord) -> None:
        """The version in force, where it did not change meanwhile: from outside nobody sees more."""
        version, digest = self._version()
        if (version, digest) != self._began_with:
            record.untrainable(
                f"ambiguous policy version: {self._began_with[0]} at the start, {version} at the end"
            )
            return
        record.weights_digest = digest
        for choice in record.choices.values():
            if choice.token_ids:
                choice.runs = [VersionRun(0, len(choice.token_ids), version)]

    @staticmethod
    def _semantics(record: CallRecord, declared: str) -> Any:
        if declared in _SEMANTICS:
            return _SEMANTICS[declared]
        plain = record.sampling.HasField("temperature") and record.sampling.temperature == 1.0
        # Raw and processed logprobs are the same where nothing reshapes the distribution.
        neutral = plain and not any("sampled with" in reason for reason in record.reasons)
        return _SEMANTICS["raw"] if neutral else model_call_pb2.LOGPROB_SEMANTICS_UNSPECIFIED

"""How a request's record begins and how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
from functools import partial

import orjson

from agl_grpc.interceptor.attempts import Attempts, KnownAttempt
from agl_grpc.interceptor.capture.record import EngineIdentity, failed_record, to_span
from agl_grpc.interceptor.capture.retries import Retries, tries_of
from agl_grpc.interceptor.capture.sink import CapturedCall
from agl_grpc.interceptor.external import EXTERNAL, ExternalTraffic
from agl_grpc.interceptor.front.capture import COMPLETE, CUT, ERROR, Capture, Submit
from agl_grpc.interceptor.front.dialects import Collector, ask_for_ids
from agl_grpc.interceptor.front.http.engines import EngineClient
from agl_grpc.interceptor.front.journal import Journal
from agl_grpc.interceptor.front.sampling import describe, impose
from agl_grpc.interceptor.front.settings import ProxySettings
from agl_grpc.interceptor.front.splice import PromptTexts
from agl_grpc.interceptor.front.turn import Turn
from agl_grpc.interceptor.front.upstreams import Upstream, Upstreams
from agl_grpc.interceptor.front.versions import PolicyVersions
from agl_grpc.interceptor.limits import RolloutLimits
from agl_grpc.interceptor.refusals import Refusal, Refused
from agl_grpc.v1 import model_call_pb2

EVENTS = "text/event-stream"
_RAW_LIMIT = 4 * 1024 * 1024
_LEFT = "the client went away before it had its whole answer"


@dataclasses.dataclass
class Counters:
    """What became of the requests since the start."""

    requests: int = 0
    captured: int = 0
    unattributed: int = 0
    refused: int = 0
    cut: int = 0
    retries: int = 0
    in_flight: int = 0


@dataclasses.dataclass
class Parts:
    """What the handler works with."""

    settings: ProxySettings
    client: EngineClient
    upstreams: Upstreams
    journal: Journal
    attempts: Attempts
    versions: PolicyVersions
    limits: RolloutLimits
    external: ExternalTraffic | None


class Recorder:
    """Begins records and ends them."""

    def __init__(self, parts: Parts, counters: Counters) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._counters = counters
        self._retries = Retries()
        self._texts = PromptTexts()
        self.refusals = Refused()

    def begin(self, turn: Turn, known: KnownAttempt | None) -> bytes:
        """Impose, ask for ids, announce; the body as it goes to the engine."""
        if not turn.recorded or (turn.attribution is None and self._parts.external is None):
            return turn.body
        attribution = turn.attribution or EXTERNAL
        explicit = turn.captured and self._settings.token_ids
        imposed = {} if known is None else known.sampling(turn.model, attribution.mode)
        if self._settings.temperature is not None and attribution.mode == "train":
            imposed["temperature"] = self._settings.temperature
        changed = dict(turn.request)
        # Traffic that is only listened to is not changed in what it samples.
        own = turn.attribution is not None and turn.captured
        if own and known is not None and changed.get("seed") is None and "seed" not in imposed:
            imposed.update(known.next_seed())
        replaced = impose(changed, attribution.mode, imposed, explicit=explicit) if own else {}
        reasons = self._reasons(turn, changed, attribution.notrain)
        sampling, more = _sampling(changed, replaced)
        self._start_capture(turn, sampling, [*reasons, *more])
        return orjson.dumps(changed) if changed != turn.request else turn.body

    def _reasons(self, turn: Turn, changed: dict[str, object], notrain: bool) -> list[str]:
        reasons = ["the agent asked for /notrain"] if notrain else []
        training = turn.attribution is not None and turn.attribution.mode == "train"
        if training and turn.captured and changed.get("use_beam_search"):
            raise Refusal(
                400,
                "beam_search",
                "beam search cannot be trained: use n with temperature, or the /mode/val base URL",
            )
        if not turn.captured:
            return [*reasons, f"no token ids: from outside {turn.api} does not give them"]
        if not self._settings.token_ids:
            return [*reasons, "no token ids: the proxy was told not to ask for them"]
        obstacle = ask_for_ids(turn.api, changed, turn.asked)
        conversation = turn.attribution and turn.attribution.attempt_id
        turn.collector = Collector(turn.api, turn.asked, self._texts if conversation else None, conversation)
        return [*reasons, f"no token ids: {obstacle}"] if obstacle else reasons

    def _start_capture(
        self, turn: Turn, sampling: model_call_pb2.SamplingParameters, reasons: list[str]
    ) -> None:
        context = turn.context() if turn.attribution else turn.external_context(EXTERNAL)
        turn.capture = Capture(
            context,
            turn.model,
            sampling,
            reasons,
            prompts=turn.asked.prompts,
            n=turn.asked.n,
            submit=self._parts.journal.submit if turn.attribution else self._submit_external(turn),
            version=partial(self._parts.versions.current, turn.model),
        )
        if self._settings.keep_raw:
            turn.capture.raw_request = turn.body
            # Once the request is on its way: the engine need not wait for it.
            asyncio.get_running_loop().call_soon(turn.capture.pack_request)
        if turn.attribution is None:
            return
        for number, record in enumerate(turn.capture.records):
            self._parts.journal.announce(turn.capture.attempt, record.span_id, record.started)
            digest = hash((turn.digest(), number))
            self._counters.retries += self._retries.mark(
                record, turn.capture.attempt, digest, tries_of(turn.headers)
            )

    def _submit_external(self, turn: Turn) -> Submit:
        external = self._parts.external
        session = turn.headers.get("x-agl-session", "")

        # It must not hold the turn, which holds it: what is a cycle lies in memory until the collector comes.
        def submit(call: CapturedCall) -> asyncio.Future[None]:
            if external is not None:
                external.submit(session, call)
            call.durable.set_result(None)
            return call.durable

        return submit

    def complete(
        self, turn: Turn, engine: Upstream, raw: bytes, media_type: str = "application/json"
    ) -> None:
        capture, collector = turn.capture, turn.collector
        assert capture is not None
        assert collector is not None
        outcome = COMPLETE
        if collector.error:
            outcome = ERROR
        elif any(choice.finish_reason == "abort" for choice in collector.choices.values()):
            outcome = CUT
        capture.finish(
            outcome,
            collector,
            engine,
            error=collector.error,
            raw_response=raw,
            media_type=media_type,
            logprobs_mode=self._settings.logprobs_mode,
        )
        self._counters.captured += 1

    def failed(
        self, turn: Turn, outcome: int, reason: str, *, engine: Upstream | None = None, raw: bytes = b""
    ) -> None:
        """The record of a call that came to no good end: what came of it, and why."""
        if turn.capture is None:
            return
        self._counters.cut += outcome == CUT
        turn.capture.finish(
            outcome,
            turn.collector,
            engine,
            error=reason,
            raw_response=raw,
            media_type=EVENTS if turn.asked.stream else "application/json",
            logprobs_mode=self._settings.logprobs_mode,
        )

    async def refused(self, turn: Turn, refusal: Refusal) -> None:
        """The record of a call that is answered with an error of ours: durable before that, as any other."""
        self.failed(turn, ERROR, refusal.message)
        if turn.capture is not None:
            await turn.capture.kept()

    def turned_away(self, turn: Turn | None, refusal: Refusal) -> None:
        """Count a refusal; the first of its kind that came before its call had begun leaves a record with the
        attempt, which nobody waits for.
        """
        if turn is None or turn.attribution is None or turn.capture is not None or not turn.recorded:
            self.refusals.note(refusal)
            return
        attribution = turn.attribution
        if self.refusals.note(refusal, attribution.attempt_id):
            record = failed_record(turn.context(), turn.model, refusal.status, refusal.message)
            span = to_span(record, EngineIdentity("", "", turn.model, False))
            attempt = (attribution.rollout_id, attribution.attempt_id)
            self._parts.journal.submit(CapturedCall(attempt, span, [], {}))

    def client_left(self, turn: Turn) -> None:
        if turn.capture is None:
            return
        for record in turn.capture.records:
            self._retries.lost(turn.capture.attempt, record.span_id)
        self.failed(turn, CUT, _LEFT)


class Kept:
    """A stream's bytes for its record, as far as they are wanted and not too many."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, chunk: bytes) -> None:
        """Keep a chunk."""
        self._size += len(chunk)
        if self._wanted and self._size <= _RAW_LIMIT:
            self._chunks.append(chunk)

    @property
    def data(self) -> bytes:
        """All of it; nothing when it was too much."""
        return b"".join(self._chunks) if self._size <= _RAW_LIMIT else b""


def _sampling(
    request: dict[str, object], replaced: dict[str, object]
) -> tuple[model_call_pb2.SamplingParameters, list[str]]:
    try:
        return describe(request, replaced)
    except (TypeError, ValueError):
        # The engine will say what is wrong with them.
        return model_call_pb2.SamplingParameters(), ["sampling parameters of a wrong type"]

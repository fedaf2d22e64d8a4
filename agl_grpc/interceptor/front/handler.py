"""What becomes of a request: refused, passed through, or captured."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict

from agl_grpc.interceptor.attempts import Attempts, KnownAttempt
from agl_grpc.interceptor.external import EXTERNAL, ExternalTraffic
from agl_grpc.interceptor.front.capture import COMPLETE, CUT, ERROR, Capture
from agl_grpc.interceptor.front.dialects import Collector, ask_for_ids, asked_by
from agl_grpc.interceptor.front.exchange import Exchange, Outgoing, answer_headers, passed_headers
from agl_grpc.interceptor.front.journal import Journal
from agl_grpc.interceptor.front.limits import RolloutLimits
from agl_grpc.interceptor.front.sampling import describe, impose
from agl_grpc.interceptor.front.settings import ProxySettings
from agl_grpc.interceptor.front.streams import BrokenStream, Events
from agl_grpc.interceptor.front.turn import Turn, begin
from agl_grpc.interceptor.front.upstreams import Upstream, Upstreams
from agl_grpc.interceptor.front.versions import PolicyVersions
from agl_grpc.interceptor.middleware import RETRY_AFTER_SECONDS
from agl_grpc.interceptor.refusals import Refusal, upstream_failed
from agl_grpc.interceptor.retries import Retries, tries_of
from agl_grpc.interceptor.sink import CapturedCall
from agl_grpc.v1 import model_call_pb2

logger = logging.getLogger("agl_grpc.interceptor")

_EVENTS = "text/event-stream"
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
    session: aiohttp.ClientSession
    upstreams: Upstreams
    journal: Journal
    attempts: Attempts
    versions: PolicyVersions
    limits: RolloutLimits
    external: ExternalTraffic | None


class Handler:
    """Serves requests; `drain` makes it take no new ones."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._exchange = Exchange(parts.session, parts.upstreams)
        self._retries = Retries()
        self.counters = Counters()
        self.draining = False
        self.idle = asyncio.Event()
        """Set while no request is under way."""
        self.idle.set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request from its arrival to its end."""
        api = ""
        self.counters.requests += 1
        self.counters.in_flight += 1
        self.idle.clear()
        try:
            self._check_room()
            turn = begin(request.method, request.raw_path, _headers(request))
            api = turn.api
            return await self._serve(request, turn)
        except Refusal as refusal:
            self.counters.refused += 1
            return refused(refusal, api)
        finally:
            self.counters.in_flight -= 1
            if not self.counters.in_flight:
                self.idle.set()

    def _check_room(self) -> None:
        if self.draining:
            raise Refusal(503, "draining", "the proxy is stopping", retry_after=RETRY_AFTER_SECONDS)
        if self.counters.in_flight > self._settings.max_in_flight:
            raise Refusal(
                503, "overloaded", f"{self._settings.max_in_flight} requests are under way", retry_after=1
            )

    async def _serve(self, request: web.BaseRequest, turn: Turn) -> web.StreamResponse:
        known = await self._admit(turn)
        rollout = "" if turn.attribution is None else turn.attribution.rollout_id
        if rollout and turn.recorded:
            self._parts.limits.enter(rollout)
        try:
            return await self._read_and_answer(request, turn, known)
        except Refusal as refusal:
            self._end_failed(turn, ERROR, refusal.message)
            raise
        except (asyncio.CancelledError, ConnectionError):
            self._client_left(turn)
            raise
        finally:
            if rollout and turn.recorded:
                self._parts.limits.leave(rollout, turn.capture.tokens if turn.capture else 0)

    async def _admit(self, turn: Turn) -> KnownAttempt | None:
        """Raises Refusal for who may not call."""
        if turn.attribution is None:
            self.counters.unattributed += 1
            if self._settings.unattributed == "refuse":
                raise Refusal(
                    401,
                    "unattributed",
                    "this call names no attempt: use the attempt's base URL or credential",
                )
            return None
        if turn.recorded and not self._parts.journal.accepting():
            raise Refusal(
                503,
                "spool_full",
                "the capture spool is full because the store has been away for too long: try later",
                retry_after=RETRY_AFTER_SECONDS,
            )
        known = await self._parts.attempts.admit(turn.attribution)
        if known is not None and known.mode and not turn.mode_given:
            turn.attribution = dataclasses.replace(turn.attribution, mode=known.mode)
        return known

    async def _read_and_answer(
        self, request: web.BaseRequest, turn: Turn, known: KnownAttempt | None
    ) -> web.StreamResponse:
        try:
            turn.read(await request.read())
        except web.HTTPRequestEntityTooLarge:
            refusal = Refusal(
                413, "request_too_large", f"the body has more than {self._settings.max_body} bytes"
            )
            self._begin_record(turn, known)
            raise refusal from None
        except Refusal:
            self._begin_record(turn, known)
            raise
        turn.asked = asked_by(turn.api, turn.request)
        body = self._begin_record(turn, known)
        if turn.method == "GET" and turn.path == "/v1/models":
            return await self._models(turn)
        engines = self._engines(turn)
        engine, answer = await self._send(turn, engines, body)
        engine.in_flight += 1
        try:
            if turn.capture is not None and turn.collector is not None and answer.status == 200:
                if answer.content_type == _EVENTS:
                    return await self._captured_stream(request, turn, engine, answer)
                return await self._captured_whole(turn, engine, answer)
            return await self._passed(request, turn, engine, answer)
        finally:
            engine.in_flight -= 1
            answer.close() if not answer.closed else None

    # Before the engine -------------------------------------------------------------------------------------

    def _begin_record(self, turn: Turn, known: KnownAttempt | None) -> bytes:
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
        turn.collector = Collector(turn.api, turn.asked)
        return [*reasons, f"no token ids: {obstacle}"] if obstacle else reasons

    def _start_capture(
        self, turn: Turn, sampling: model_call_pb2.SamplingParameters, reasons: list[str]
    ) -> None:
        external = self._parts.external
        session = turn.headers.get("x-agl-session", "")

        def submit(call: CapturedCall) -> asyncio.Future[None]:
            if turn.attribution is not None:
                return self._parts.journal.submit(call)
            if external is not None:
                external.submit(session, call)
            call.durable.set_result(None)
            return call.durable

        context = turn.context() if turn.attribution else turn.external_context(EXTERNAL)
        turn.capture = Capture(
            context,
            turn.model,
            sampling,
            reasons,
            prompts=turn.asked.prompts,
            n=turn.asked.n,
            submit=submit,
            version=lambda: self._parts.versions.current(turn.model),
        )
        if self._settings.keep_raw:
            turn.capture.raw_request = turn.body
        if turn.attribution is None:
            return
        for number, record in enumerate(turn.capture.records):
            self._parts.journal.announce(turn.capture.attempt, record.span_id, record.started)
            digest = hash((turn.digest(), number))
            retry = self._retries.note(turn.capture.attempt, digest, record.span_id, tries_of(turn.headers))
            record.retry_of = retry.span_id
            self.counters.retries += bool(retry.candidates)
            if retry.candidates > 1:
                record.untrainable(
                    f"a retry of one of {retry.candidates} equal calls: which one is not known"
                )

    def _engines(self, turn: Turn) -> list[Upstream]:
        key = turn.credential if turn.attribution is None else turn.attribution.rollout_id
        return self._parts.upstreams.for_call(turn.model, key)

    async def _send(
        self, turn: Turn, engines: Sequence[Upstream], body: bytes
    ) -> tuple[Upstream, aiohttp.ClientResponse]:
        """To the engine, without what it does not know."""
        path = f"{turn.path}?{turn.query}" if turn.query else turn.path
        headers = passed_headers(turn.headers.items(), self._key(turn))
        asks = turn.collector is not None
        if asks and engines[0].ids_refused:
            return await self._send_plain(turn, engines, path, headers)
        engine, answer = await self._exchange.send(engines, Outgoing(turn.method, path, headers, body))
        if asks and answer.status in (400, 422) and b"return_token_ids" in await answer.read():
            logger.warning("engine %s knows no return_token_ids: its calls are not trained", engine.spec.url)
            engine.ids_refused = True
            return await self._send_plain(turn, [engine], path, headers)
        return engine, answer

    async def _send_plain(
        self, turn: Turn, engines: Sequence[Upstream], path: str, headers: CIMultiDict[str]
    ) -> tuple[Upstream, aiohttp.ClientResponse]:
        turn.collector = None
        if turn.capture is not None:
            turn.capture.untrainable("no token ids: the engine does not know return_token_ids")
        return await self._exchange.send(engines, Outgoing(turn.method, path, headers, turn.body))

    def _key(self, turn: Turn) -> str | None:
        """The engine's key; an agent's own is passed on unless it is a credential of ours."""
        if self._settings.upstream_key:
            return self._settings.upstream_key
        return None if turn.credential.startswith("agl1.") else turn.credential or None

    # After the engine --------------------------------------------------------------------------------------

    async def _captured_whole(
        self, turn: Turn, engine: Upstream, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        capture, collector = turn.capture, turn.collector
        assert capture is not None
        assert collector is not None
        data = await _whole(answer)
        try:
            content = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise upstream_failed(f"engine {engine.spec.url} sent an answer that is not JSON") from None
        if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
            raise upstream_failed(f"engine {engine.spec.url} sent an answer without choices")
        capture.first_token()
        changed, _ = collector.take(content)
        if changed:
            data = orjson.dumps(content)
        self._complete(turn, engine, data if self._settings.keep_raw else b"")
        await asyncio.wait(capture.durable)
        return web.Response(body=data, status=answer.status, headers=answer_headers(answer.headers))

    async def _captured_stream(
        self, request: web.BaseRequest, turn: Turn, engine: Upstream, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        capture, collector = turn.capture, turn.collector
        assert capture is not None
        assert collector is not None
        response = web.StreamResponse(status=answer.status, headers=answer_headers(answer.headers))
        await response.prepare(request)
        events, kept = Events(collector), _Kept(self._settings.keep_raw)
        try:
            async for chunk in answer.content.iter_any():
                out = events.feed(chunk)
                if not capture.records[0].first_token_ns and collector.choices:
                    capture.first_token()
                if out:
                    kept.add(out)
                    await response.write(out)
                events.check()
            events.end()
        except (BrokenStream, aiohttp.ClientError, TimeoutError) as error:
            reason = str(error) if isinstance(error, BrokenStream) else "the engine's stream broke off"
            self._end_failed(turn, CUT, reason, engine=engine, raw=kept.data)
            await response.write(upstream_failed(reason).event(turn.api))
        else:
            self._complete(turn, engine, kept.data, _EVENTS)
            await asyncio.wait(capture.durable)
            if events.held:
                await response.write(events.held)
        await response.write_eof()
        return response

    async def _passed(
        self, request: web.BaseRequest, turn: Turn, engine: Upstream, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        """An answer whose bytes go through as they are; its record says what can be said."""
        kept = _Kept(self._settings.keep_raw and turn.capture is not None)
        headers = answer_headers(answer.headers)
        if answer.content_type != _EVENTS:
            data = await _whole(answer)
            kept.add(data)
            await self._end_passed(turn, engine, answer, kept.data, said=data)
            return web.Response(body=data, status=answer.status, headers=headers)
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        try:
            async for chunk in answer.content.iter_any():
                kept.add(chunk)
                await response.write(chunk)
        except (aiohttp.ClientError, TimeoutError):
            reason = "the engine's stream broke off"
            self._end_failed(turn, CUT, reason, engine=engine, raw=kept.data)
            await response.write(upstream_failed(reason).event(turn.api))
        await self._end_passed(turn, engine, answer, kept.data)
        await response.write_eof()
        return response

    async def _end_passed(
        self,
        turn: Turn,
        engine: Upstream,
        answer: aiohttp.ClientResponse,
        raw: bytes,
        said: bytes = b"",
    ) -> None:
        if turn.capture is None:
            return
        if answer.status >= 400:
            reason = f"the engine answered {answer.status}: {said[:300].decode(errors='replace')}"
            self._end_failed(turn, ERROR, reason, engine=engine, raw=raw)
        else:
            turn.capture.finish(COMPLETE, None, engine, raw_response=raw, media_type=answer.content_type)
            self.counters.captured += 1
        if turn.capture.durable:
            await asyncio.wait(turn.capture.durable)

    def _complete(
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
        self.counters.captured += 1

    def _end_failed(
        self, turn: Turn, outcome: int, reason: str, *, engine: Upstream | None = None, raw: bytes = b""
    ) -> None:
        """The record of a call that came to no good end: what came of it, and why."""
        if turn.capture is None:
            return
        self.counters.cut += outcome == CUT
        turn.capture.finish(
            outcome,
            turn.collector,
            engine,
            error=reason,
            raw_response=raw,
            media_type=_EVENTS if turn.asked.stream else "application/json",
            logprobs_mode=self._settings.logprobs_mode,
        )

    def _client_left(self, turn: Turn) -> None:
        if turn.capture is None:
            return
        for record in turn.capture.records:
            self._retries.lost(turn.capture.attempt, record.span_id)
        self._end_failed(turn, CUT, _LEFT)

    async def _models(self, turn: Turn) -> web.StreamResponse:
        """All engines' models in one list."""
        headers = passed_headers(turn.headers.items(), self._key(turn))
        found: dict[str, object] = {}
        for engine in {engine.spec.url: engine for engine in self._parts.upstreams.all()}.values():
            try:
                _, answer = await self._exchange.send([engine], Outgoing("GET", turn.path, headers, b""))
                content = orjson.loads(await answer.read())
            except (Refusal, orjson.JSONDecodeError, aiohttp.ClientError):
                continue
            models = content.get("data") if isinstance(content, dict) else None
            for model in models if isinstance(models, list) else ():
                if isinstance(model, dict) and isinstance(model.get("id"), str):
                    found.setdefault(model["id"], model)
        body = orjson.dumps({"object": "list", "data": list(found.values())})
        return web.Response(body=body, content_type="application/json")


class _Kept:
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


def refused(refusal: Refusal, api: str) -> web.Response:
    """A refusal as an answer."""
    headers = {**refusal.headers(), "content-type": "application/json"}
    return web.Response(body=refusal.body(api), status=refusal.status, headers=headers)


def _headers(request: web.BaseRequest) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    try:
        return await answer.read()
    except (aiohttp.ClientError, OSError) as error:
        raise upstream_failed("the engine's answer broke off") from error
    except TimeoutError:
        raise Refusal(504, "upstream_timeout", "the engine's answer did not come in time") from None


def _sampling(
    request: dict[str, object], replaced: dict[str, object]
) -> tuple[model_call_pb2.SamplingParameters, list[str]]:
    try:
        return describe(request, replaced)
    except (TypeError, ValueError):
        # The engine will say what is wrong with them.
        return model_call_pb2.SamplingParameters(), ["sampling parameters of a wrong type"]

"""What becomes of a request: refused, passed through, or captured."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence

import orjson

from agl_grpc.interceptor.attempts import KnownAttempt
from agl_grpc.interceptor.front.capture import COMPLETE, CUT, ERROR
from agl_grpc.interceptor.front.dialects import asked_by
from agl_grpc.interceptor.front.exchange import Exchange, Outgoing, answer_headers, passed_headers
from agl_grpc.interceptor.front.http.door import BodyTooLarge, Incoming
from agl_grpc.interceptor.front.http.engines import EngineAnswer, EngineError
from agl_grpc.interceptor.front.recording import EVENTS, Counters, Kept, Parts, Recorder
from agl_grpc.interceptor.front.streams import BrokenStream, Events
from agl_grpc.interceptor.front.turn import Turn, begin
from agl_grpc.interceptor.front.upstreams import Upstream
from agl_grpc.interceptor.refusals import RETRY_AFTER_SECONDS, Refusal, upstream_failed

logger = logging.getLogger("agl_grpc.interceptor")

JSON = ((b"content-type", b"application/json"),)


class Handler:
    """Serves requests; `drain` makes it take no new ones."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._exchange = Exchange(parts.client, parts.upstreams)
        self.counters = Counters()
        self.recorder = Recorder(parts, self.counters)
        self.draining = False
        self.idle = asyncio.Event()
        """Set while no request is under way."""
        self.idle.set()

    async def handle(self, request: Incoming) -> None:
        """One request from its arrival to its end."""
        api = ""
        turn: Turn | None = None
        self.counters.requests += 1
        self.counters.in_flight += 1
        self.idle.clear()
        try:
            self._check_room()
            turn = begin(request.method, request.target, request.headers)
            api = turn.api
            await self._serve(request, turn)
        except Refusal as refusal:
            self.counters.refused += 1
            self.recorder.turned_away(turn, refusal)
            refuse(request, refusal, api)
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

    async def _serve(self, request: Incoming, turn: Turn) -> None:
        known = await self._admit(turn)
        rollout = "" if turn.attribution is None else turn.attribution.rollout_id
        if rollout and turn.recorded:
            self._parts.limits.enter(rollout)
        try:
            await self._read_and_answer(request, turn, known)
        except Refusal as refusal:
            await self.recorder.refused(turn, refusal)
            raise
        except (asyncio.CancelledError, ConnectionError):
            self.recorder.client_left(turn)
            raise
        except Exception as error:  # a defect here: the call must be closed, the client told
            logger.exception("request of %s failed", turn.path)
            defect = Refusal(500, "internal", "a defect of the proxy; its log has the reason", retry_after=1)
            self.recorder.failed(turn, ERROR, f"capture failed: {type(error).__name__}")
            raise defect from error
        finally:
            if rollout and turn.recorded:
                self._parts.limits.spend(rollout, turn.capture.tokens if turn.capture else 0)
                self._parts.limits.leave(rollout)

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
                recorded=False,
            )
        known = await self._parts.attempts.admit(turn.attribution)
        if known is not None and known.mode and not turn.mode_given:
            turn.attribution = dataclasses.replace(turn.attribution, mode=known.mode)
        return known

    async def _read_and_answer(self, request: Incoming, turn: Turn, known: KnownAttempt | None) -> None:
        try:
            turn.read(await request.read())
        except BodyTooLarge:
            refusal = Refusal(
                413, "request_too_large", f"the body has more than {self._settings.max_body} bytes"
            )
            self.recorder.begin(turn, known)
            raise refusal from None
        except Refusal:
            self.recorder.begin(turn, known)
            raise
        turn.asked = asked_by(turn.api, turn.request)
        body = self.recorder.begin(turn, known)
        if turn.method == "GET" and turn.path == "/v1/models":
            await self._models(request, turn)
            return
        engines = self._engines(turn)
        engine, answer = await self._send(turn, engines, body)
        engine.in_flight += 1
        try:
            if turn.capture is not None and turn.collector is not None and answer.status == 200:
                captured = self._captured_stream if answer.content_type == EVENTS else self._captured_whole
                await captured(request, turn, engine, answer)
            else:
                await self._passed(request, turn, engine, answer)
        finally:
            engine.in_flight -= 1
            answer.close()

    def _engines(self, turn: Turn) -> list[Upstream]:
        key = turn.credential if turn.attribution is None else turn.attribution.rollout_id
        return self._parts.upstreams.for_call(turn.model, key)

    async def _send(
        self, turn: Turn, engines: Sequence[Upstream], body: bytes
    ) -> tuple[Upstream, EngineAnswer]:
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
        self, turn: Turn, engines: Sequence[Upstream], path: str, headers: Sequence[tuple[str, str]]
    ) -> tuple[Upstream, EngineAnswer]:
        turn.collector = None
        if turn.capture is not None:
            turn.capture.untrainable("no token ids: the engine does not know return_token_ids")
        return await self._exchange.send(engines, Outgoing(turn.method, path, headers, turn.body))

    def _key(self, turn: Turn) -> str | None:
        """The engine's key; an agent's own is passed on unless it is a credential of ours."""
        if self._settings.upstream_key:
            return self._settings.upstream_key
        return None if turn.credential.startswith("agl1.") else turn.credential or None

    async def _captured_whole(
        self, request: Incoming, turn: Turn, engine: Upstream, answer: EngineAnswer
    ) -> None:
        capture, collector = turn.capture, turn.collector
        assert capture is not None
        assert collector is not None
        data = await _whole(answer)
        try:
            data = collector.take_whole(data)
        except orjson.JSONDecodeError:
            raise upstream_failed(f"engine {engine.spec.url} sent an answer that is not JSON") from None
        except ValueError as error:
            raise upstream_failed(f"engine {engine.spec.url} sent {error}") from None
        capture.first_token()
        self.recorder.complete(turn, engine, data if self._settings.keep_raw else b"")
        await capture.kept()
        request.answer(answer.status, answer_headers(answer.headers), data)

    async def _captured_stream(
        self, request: Incoming, turn: Turn, engine: Upstream, answer: EngineAnswer
    ) -> None:
        capture, collector = turn.capture, turn.collector
        assert capture is not None
        assert collector is not None
        response = request.stream(answer.status, answer_headers(answer.headers))
        events, kept = Events(collector), Kept(self._settings.keep_raw)
        try:
            while chunk := await answer.piece():
                out = events.feed(chunk)
                if not capture.records[0].first_token_ns and collector.choices:
                    capture.first_token()
                if out:
                    kept.add(out)
                    await response.write(out)
                collector.read_prompts()
                events.check()
            events.end()
        except (BrokenStream, EngineError, TimeoutError) as error:
            reason = str(error) if isinstance(error, BrokenStream) else "the engine's stream broke off"
            self.recorder.failed(turn, CUT, reason, engine=engine, raw=kept.data)
            await response.write(upstream_failed(reason).event(turn.api))
            await capture.kept()
        else:
            self.recorder.complete(turn, engine, kept.data, EVENTS)
            await capture.kept()
            if events.held:
                await response.write(events.held)
        response.end()

    async def _passed(self, request: Incoming, turn: Turn, engine: Upstream, answer: EngineAnswer) -> None:
        """An answer whose bytes go through as they are; its record says what can be said."""
        kept = Kept(self._settings.keep_raw and turn.capture is not None)
        headers = answer_headers(answer.headers)
        if answer.content_type != EVENTS:
            data = await _whole(answer)
            kept.add(data)
            await self._end_passed(turn, engine, answer, kept.data, said=data)
            request.answer(answer.status, headers, data)
            return
        response = request.stream(answer.status, headers)
        try:
            while chunk := await answer.piece():
                kept.add(chunk)
                await response.write(chunk)
        except (EngineError, TimeoutError):
            reason = "the engine's stream broke off"
            self.recorder.failed(turn, CUT, reason, engine=engine, raw=kept.data)
            await response.write(upstream_failed(reason).event(turn.api))
        await self._end_passed(turn, engine, answer, kept.data)
        response.end()

    async def _end_passed(
        self,
        turn: Turn,
        engine: Upstream,
        answer: EngineAnswer,
        raw: bytes,
        said: bytes = b"",
    ) -> None:
        if turn.capture is None:
            return
        if answer.status >= 400:
            reason = f"the engine answered {answer.status}: {said[:300].decode(errors='replace')}"
            self.recorder.failed(turn, ERROR, reason, engine=engine, raw=raw)
        else:
            turn.capture.finish(COMPLETE, None, engine, raw_response=raw, media_type=answer.content_type)
            self.counters.captured += 1
        await turn.capture.kept()

    async def _models(self, request: Incoming, turn: Turn) -> None:
        """All engines' models in one list."""
        headers = passed_headers(turn.headers.items(), self._key(turn))
        found: dict[str, object] = {}
        for engine in {engine.spec.url: engine for engine in self._parts.upstreams.all()}.values():
            try:
                _, answer = await self._exchange.send([engine], Outgoing("GET", turn.path, headers, b""))
                content = orjson.loads(await answer.read())
            except (Refusal, orjson.JSONDecodeError, EngineError, TimeoutError):
                continue
            models = content.get("data") if isinstance(content, dict) else None
            for model in models if isinstance(models, list) else ():
                if isinstance(model, dict) and isinstance(model.get("id"), str):
                    found.setdefault(model["id"], model)
        body = orjson.dumps({"object": "list", "data": list(found.values())})
        request.answer(200, JSON, body)


def refuse(request: Incoming, refusal: Refusal, api: str) -> None:
    """Answer with a refusal."""
    headers = [(name.encode(), value.encode()) for name, value in refusal.headers().items()]
    request.answer(refusal.status, [*headers, *JSON], refusal.body(api))


async def _whole(answer: EngineAnswer) -> bytes:
    try:
        return await answer.read()
    except EngineError as error:
        raise upstream_failed("the engine's answer broke off") from error
    except TimeoutError:
        raise Refusal(504, "upstream_timeout", "the engine's answer did not come in time") from None

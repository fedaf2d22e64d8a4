"""One HTTP request and its answer inside the engine: its bytes noted, its end held until its calls are on
disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from agl_grpc.interceptor.capture.raw import raw_payload
from agl_grpc.interceptor.refusals import Refusal, in_dialect, reason_of
from agl_grpc.v1 import common_pb2

if TYPE_CHECKING:
    from agl_grpc.interceptor.capture.record import CallRecord

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Submit = Callable[["CallRecord"], "asyncio.Future[None] | None"]
"""Takes a finished record; what it answers resolves when the record is on disk."""

Failed = Callable[[int, str, common_pb2.Payload | None], "asyncio.Future[None]"]
"""Records a request that ended as an error before it reached the engine: status, reason, request."""

_ABOUT_BODY = (b"content-type", b"content-length")
_KEPT_BYTES = 4 * 1024 * 1024


class HeldAnswer:
    """Between the application and its client.

    While a call runs, messages pass as they come. Once all calls of the request have ended, what follows
    (the end of a stream, or a whole answer) waits for its last message, by which the answer is complete and
    can be part of the records; it goes out when these are durable. With `keep_raw` the bytes of request and
    answer are part of the first record. `spend` is told of tokens that the request has used.

    An error is held, too. It gets the shape of the dialect `api` where the application has given it another
    one; if it came before any call of the engine was captured, `failed` makes its record of status and
    reason. A request of more than `max_body` bytes (0: no limit) is an error.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        path: str,
        tries: int,
        keep_raw: bool,
        api: str = "",
        max_body: int = 0,
        spend: Callable[[int], None] | None = None,
        failed: Failed | None = None,
    ) -> None:
        self._receive = receive
        self._send = send
        self._path = path
        self._api = api
        self._max_body = max_body
        self._spend = spend
        self._failed = failed
        self._size = 0
        self._status = 200
        self._captured = False
        self._keep_raw = keep_raw
        self._request: list[bytes] = []
        self._answer: list[bytes] = []
        self._answered = 0
        self._media_type = "application/json"
        self._waiting: list[Message] = []
        self._ended: list[tuple[CallRecord, Submit]] = []
        self._running = 0
        self._closed = False
        self._passing = False
        self._seen: set[str] = set()
        self.complete = False
        """Whether all of an answer that is no error has come."""
        self.calls = 0
        self.tries = tries
        """How often the client says that it has asked before."""

    def begun(self) -> int:
        """A call of the engine begins: its number within the request."""
        self._running += 1
        self.calls += 1
        return self.calls - 1

    def ended(self, record: CallRecord, submit: Submit) -> None:
        """A call of the engine has ended, perhaps after its client has left."""
        self._running -= 1
        self._captured = True
        self.spent(record.tokens)
        self._ended.append((record, submit))
        if self._closed:
            self._submit()

    def spent(self, tokens: int) -> None:
        """The request has used so many tokens more."""
        if self._spend is not None:
            self._spend(tokens)

    def abandoned(self) -> None:
        """A call never reached the engine."""
        self._running -= 1

    def first_of(self, name: str) -> bool:
        """Whether a name is new within this request; from now on it is not."""
        new = name not in self._seen
        self._seen.add(name)
        return new

    def digest(self) -> int:
        """Stands for the request as the client sent it, in this process."""
        return hash((self._path, b"".join(self._request)))

    async def receive(self) -> Message:
        """As ASGI's, noting the request's body."""
        message = await self._receive()
        if message["type"] == "http.request" and message.get("body"):
            self._size += len(message["body"])
            if self._too_large:
                self._request.clear()
                # The application makes an error of it, whose place ours takes.
                raise ValueError("the body is too large")
            self._request.append(message["body"])
        return message

    @property
    def _too_large(self) -> bool:
        return 0 < self._max_body < self._size

    def send(self, message: Message) -> Awaitable[None]:
        """As ASGI's."""
        if self._passing and not self._ended and message["type"] == "http.response.body":
            # Each token of a stream comes this way.
            if self._keep_raw:
                self._note(message.get("body", b""))
            return self._send(message)
        return self._hold(message)

    async def _hold(self, message: Message) -> None:
        """Note the message; it leaves when all that it waits for has come."""
        if message["type"] == "http.response.body":
            self._note(message.get("body", b""))
        else:
            self._note_head(message)
        self._waiting.append(message)
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        self.complete = last and self._status < 400
        if self._failed is not None and self._status >= 400:
            if not last:
                return
            await self._end_error(self._failed)
        elif self._ended and not self._running:
            if not last:
                return
            if durable := self._submit():
                await asyncio.wait(durable)
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            await self._send(each)
        self._passing = self._failed is None or self._status < 400

    async def _end_error(self, failed: Failed) -> None:
        """Give the error its shape, and make it durable."""
        body = b"".join(message.get("body", b"") for message in self._waiting[1:])
        if self._too_large:
            refusal = Refusal(413, "request_too_large", f"the body has more than {self._max_body} bytes")
            self._status = refusal.status
            shaped = refusal.body(self._api)
        else:
            shaped = in_dialect(self._status, body, self._api)
        if shaped != body:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(shaped))]
            headers += [each for each in self._waiting[0]["headers"] if each[0].lower() not in _ABOUT_BODY]
            head = {"type": "http.response.start", "status": self._status, "headers": headers}
            self._waiting = [head, {"type": "http.response.body", "body": shaped}]
            self._answer, self._answered = [shaped], len(shaped)
        durable = self._submit()
        if not self._captured:
            raw = raw_payload(b"".join(self._request)) if self._keep_raw else None
            durable.append(failed(self._status, reason_of(shaped), raw))
        if durable:
            await asyncio.wait(durable)

    def close(self) -> None:
        """The request is over, whatever became of it: nothing that was captured may be left behind."""
        self._closed = True
        self._submit()

    def _submit(self) -> list[asyncio.Future[None]]:
        ended, self._ended = self._ended, []
        if ended and self._keep_raw:
            first = ended[0][0]
            first.raw_request = raw_payload(b"".join(self._request))
            if self._answered <= _KEPT_BYTES:
                first.raw_response = raw_payload(b"".join(self._answer), self._media_type)
        submitted = [submit(record) for record, submit in ended]
        return [durable for durable in submitted if durable is not None]

    def _note(self, data: bytes) -> None:
        self._answered += len(data)
        if self._keep_raw and data and self._answered <= _KEPT_BYTES:
            self._answer.append(data)

    def _note_head(self, message: Message) -> None:
        self._status = message.get("status", 200)
        for name, value in message.get("headers", ()):
            if name.lower() == b"content-type":
                self._media_type = value.partition(b";")[0].strip().decode("latin-1")

"""One HTTP request and its answer inside the engine: its bytes noted, its end held until its calls are on
disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from agl_grpc.interceptor.raw import raw_payload

if TYPE_CHECKING:
    from agl_grpc.interceptor.record import CallRecord

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Submit = Callable[["CallRecord"], "asyncio.Future[None] | None"]
"""Takes a finished record; what it answers resolves when the record is on disk."""

_KEPT_BYTES = 4 * 1024 * 1024


class HeldAnswer:
    """Between the application and its client.

    While a call runs, messages pass as they come. Once all calls of the request have ended, what follows
    (the end of a stream, or a whole answer) waits for its last message, by which the answer is complete and
    can be part of the records; it goes out when these are durable. With `keep_raw` the bytes of request and
    answer are part of the first record. `spend` is told how many tokens each ended call has used.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        path: str,
        tries: int,
        keep_raw: bool,
        spend: Callable[[int], None] | None = None,
    ) -> None:
        self._receive = receive
        self._send = send
        self._path = path
        self._spend = spend
        self._keep_raw = keep_raw
        self._request: list[bytes] = []
        self._answer: list[bytes] = []
        self._answered = 0
        self._media_type = "application/json"
        self._waiting: list[Message] = []
        self._ended: list[tuple[CallRecord, Submit]] = []
        self._running = 0
        self._closed = False
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
        if self._spend is not None:
            self._spend(record.tokens)
        self._ended.append((record, submit))
        if self._closed:
            self._submit()

    def abandoned(self) -> None:
        """A call never reached the engine."""
        self._running -= 1

    def digest(self) -> int:
        """Stands for the request as the client sent it, in this process."""
        return hash((self._path, b"".join(self._request)))

    async def receive(self) -> Message:
        """As ASGI's, noting the request's body."""
        message = await self._receive()
        if message["type"] == "http.request" and message.get("body"):
            self._request.append(message["body"])
        return message

    async def send(self, message: Message) -> None:
        """As ASGI's."""
        if message["type"] == "http.response.body":
            self._note(message.get("body", b""))
        else:
            self._note_head(message)
        self._waiting.append(message)
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self._ended and not self._running:
            if not last:
                return
            if durable := self._submit():
                await asyncio.wait(durable)
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            await self._send(each)

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
        for name, value in message.get("headers", ()):
            if name.lower() == b"content-type":
                self._media_type = value.partition(b";")[0].strip().decode("latin-1")

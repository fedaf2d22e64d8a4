"""Server-sent events on their way through: ids taken out of those that carry them, all others untouched."""

from __future__ import annotations

from agl_grpc.interceptor.front.dialects import Collector

_LONGEST_EVENT = 64 * 1024 * 1024
_DONE = b"[DONE]"


class BrokenStream(Exception):
    """The engine's stream cannot be read; the message says why."""


class Events:
    """Turns chunks of an engine's stream into what the client is sent.

    The event that ends the stream is kept in `held`, for when the record is durable.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._rest = b""
        self._broken: BrokenStream | None = None
        self.held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What can go out now; nothing more does once an event was none of the dialect (see `check`)."""
        data = self._rest + chunk if self._rest else chunk
        out: list[bytes] = []
        start = 0
        while (end := _event_end(data, start)) >= 0:
            event = data[start:end]
            start = end
            if self.held:
                self.held += event
                continue
            try:
                out.append(self._event(event))
            except BrokenStream as broken:
                self._broken = broken
                break
        self._rest = data[start:]
        if len(self._rest) > _LONGEST_EVENT:
            self._broken = BrokenStream("the engine sent an event without end")
        return out[0] if len(out) == 1 else b"".join(out)

    def check(self) -> None:
        """Raises BrokenStream when the engine has sent what is no event of the dialect."""
        if self._broken is not None:
            raise self._broken

    def end(self) -> None:
        """The engine's stream is over. Raises BrokenStream when it broke off."""
        if self._rest.strip():
            raise BrokenStream("the engine's stream ended in the middle of an event")
        if not self.held and not self._collector.finished() and not self._collector.error:
            raise BrokenStream("the engine's stream ended before its answer was complete")

    def _event(self, event: bytes) -> bytes:
        begin = 0 if event.startswith(b"data:") else event.find(b"\ndata:") + 1
        if begin == 0 and not event.startswith(b"data:"):
            return event  # a comment, or fields without data
        stop = event.find(b"\n", begin)
        payload = event[begin + 5 : stop].strip()
        if payload == _DONE:
            self.held = event
            return b""
        try:
            said = self._collector.take_event(payload)
        except ValueError:
            raise BrokenStream("the engine sent an event that is no JSON object") from None
        if said is None:
            return b""
        if said is payload:
            return event
        rest = stop - 1 if event[stop - 1 : stop] == b"\r" else stop
        return event[:begin] + b"data: " + said + event[rest:]


def _event_end(data: bytes, start: int) -> int:
    """Where the event that begins at `start` ends, its empty line included; -1 when it is not all there."""
    plain = data.find(b"\n\n", start)
    windows = data.find(b"\n\r\n", start, plain if plain >= 0 else len(data))
    if windows >= 0:
        return windows + 3
    return plain + 2 if plain >= 0 else -1

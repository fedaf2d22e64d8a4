"""Which earlier call an automatic retry repeats: that one's answer never reached the agent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from agl_grpc.interceptor.capture.deltas import AttemptKey
from agl_grpc.interceptor.capture.record import CallRecord

RETRY_COUNT_HEADERS = ("x-stainless-retry-count", "x-retry-count")
"""By these headers SDKs say how often they have asked before; OpenAI's and Anthropic's send the first."""

_REMEMBERED = 64


@dataclass
class _Seen:
    """A call of an attempt as far as later ones may repeat it."""

    digest: int
    span_id: bytes
    tries: int
    lost: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Retry:
    """What a call repeats: a span id, empty when none; `candidates` calls that it may be, when several."""

    span_id: bytes = b""
    candidates: int = 0


class Retries:
    """Remembers the last calls of each attempt and tells retries from samples.

    Equal requests alone say nothing: eight of them are eight samples. A call is a retry when its client says
    so, or when an equal call before it ended because its client went away. Remembers `attempts` attempts;
    those longest without a call go first.
    """

    def __init__(self, attempts: int = 20_000) -> None:
        self._limit = attempts
        self._calls: OrderedDict[AttemptKey, list[_Seen]] = OrderedDict()

    def note(self, attempt: AttemptKey, digest: int, span_id: bytes, tries: int) -> Retry:
        """A call begins. `digest` stands for its request, `tries` is what its client says of earlier ones."""
        calls = self._calls.setdefault(attempt, [])
        self._calls.move_to_end(attempt)
        retry = self._repeats(calls, digest, tries)
        calls.append(_Seen(digest, span_id, tries))
        del calls[:-_REMEMBERED]
        if len(self._calls) > self._limit:
            self._calls.popitem(last=False)
        return retry

    def mark(self, record: CallRecord, attempt: AttemptKey, digest: int, tries: int) -> bool:
        """As `note` for a call's record, which is told what it repeats; whether it is a retry."""
        retry = self.note(attempt, digest, record.span_id, tries)
        record.retry_of = retry.span_id
        if retry.candidates > 1:
            record.untrainable(f"a retry of one of {retry.candidates} equal calls: which one is not known")
        return bool(retry.candidates)

    def lost(self, attempt: AttemptKey, span_id: bytes) -> None:
        """The call's client went away before it had its whole answer."""
        for call in self._calls.get(attempt, ()):
            if call.span_id == span_id:
                call.lost = True

    @staticmethod
    def _repeats(calls: list[_Seen], digest: int, tries: int) -> Retry:
        # The try before, which may not have come this far; without a word from the client what it has lost.
        equal = [
            call
            for call in calls
            if (call.tries == tries - 1 if tries else call.lost)
            and call.digest == digest
            and not call.repeated
        ]
        lost = [call for call in equal if call.lost]
        chosen = lost[:1] or (equal if tries else [])
        if len(chosen) > 1:
            return Retry(candidates=len(chosen))
        for call in chosen:
            call.repeated = True
            return Retry(call.span_id, 1)
        return Retry()


def tries_of(headers: Mapping[str, str]) -> int:
    """How often the client says that it has asked before; 0 when it says nothing."""
    for name in RETRY_COUNT_HEADERS:
        text = headers.get(name, "")
        if text.isdigit():
            return int(text)
    return 0

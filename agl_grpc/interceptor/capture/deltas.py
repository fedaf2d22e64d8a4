"""Prompts as differences to earlier calls of the same attempt."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agl_grpc.interceptor.capture.wire import as_ids, field, packed_ids
from agl_grpc.v1 import model_call_pb2

AttemptKey = tuple[str, str]

_MIN_SAVED = 8
"""A base that saves fewer tokens than this costs more bytes than it saves."""


@dataclass(frozen=True)
class _Base:
    """A stored call: its prompt followed by one choice's response."""

    span_id: bytes
    choice: int
    tokens: array[int]


class PromptDeltas:
    """Remembers the calls that the store holds, attempt by attempt, and finds the best base for a new prompt.

    At most `max_tokens` tokens are remembered; the attempts longest without a call go first.
    """

    def __init__(self, max_tokens: int = 20_000_000, bases_per_attempt: int = 32) -> None:
        self._max_tokens = max_tokens
        self._per_attempt = bases_per_attempt
        self._bases: OrderedDict[AttemptKey, list[_Base]] = OrderedDict()
        self._tokens = 0

    def encode(self, attempt: AttemptKey, prompt: Sequence[int]) -> model_call_pb2.PromptTokens:
        """The prompt against the base that shares the longest beginning with it, else whole."""
        best: _Base | None = None
        length = _MIN_SAVED - 1
        tokens = as_ids(prompt)
        # The newest first: a conversation goes on from there, and nothing beats a whole prompt.
        for base in reversed(self._bases.get(attempt, ())):
            if length >= len(tokens):
                break
            # One look tells whether this one shares more than the best so far: most do not.
            if base.tokens[: length + 1] == tokens[: length + 1]:
                best, length = base, common_prefix(base.tokens, tokens)
        if best is None:
            return whole(tokens)
        message = whole(tokens[length:])
        message.base_span_id = best.span_id
        message.base_choice = best.choice
        message.base_length = length
        return message

    def remember(
        self,
        attempt: AttemptKey,
        span_id: bytes,
        prompt: Sequence[int],
        responses: Mapping[int, Sequence[int]],
    ) -> None:
        """Note that the store holds this call, so that later prompts may build on it."""
        bases = self._bases.setdefault(attempt, [])
        self._bases.move_to_end(attempt)
        begin = as_ids(prompt)
        for choice, response in responses.items():
            tokens = begin + as_ids(response)
            bases.append(_Base(span_id, choice, tokens))
            self._tokens += len(tokens)
        while len(bases) > self._per_attempt:
            self._tokens -= len(bases.pop(0).tokens)
        while self._tokens > self._max_tokens and len(self._bases) > 1:
            _, dropped = self._bases.popitem(last=False)
            self._tokens -= sum(len(base.tokens) for base in dropped)

    def forget(self, attempt: AttemptKey) -> None:
        """Drop an attempt's bases: the store does not know them (any more)."""
        self._tokens -= sum(len(base.tokens) for base in self._bases.pop(attempt, ()))


def whole(prompt: Sequence[int]) -> model_call_pb2.PromptTokens:
    """A prompt that needs no base."""
    return model_call_pb2.PromptTokens.FromString(packed_whole(prompt))


def packed_whole(prompt: Sequence[int]) -> bytes:
    """The same on the wire."""
    return field(model_call_pb2.PromptTokens.TOKEN_IDS_FIELD_NUMBER, packed_ids(prompt))


def common_prefix(first: array[int], second: array[int]) -> int:
    """Length of the common beginning of two token sequences."""
    low, high = 0, min(len(first), len(second))
    # Slices are compared in one go, items one by one.
    if first[:high] == second[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low

"""Limits of one rollout: calls, tokens, calls at one time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from agl_grpc.interceptor.refusals import Refusal

_REMEMBERED = 100_000


@dataclass
class _Use:
    """What a rollout has used so far."""

    calls: int = 0
    tokens: int = 0
    running: int = 0


class RolloutLimits:
    """Counts what each rollout uses; 0 = no limit. Tokens are counted when a call has ended."""

    def __init__(self, calls: int = 0, tokens: int = 0, concurrency: int = 0) -> None:
        self._calls = calls
        self._tokens = tokens
        self._concurrency = concurrency
        self._uses: OrderedDict[str, _Use] = OrderedDict()

    def enter(self, rollout_id: str) -> None:
        """A call begins. Raises Refusal when it may not."""
        use = self._uses.setdefault(rollout_id, _Use())
        self._uses.move_to_end(rollout_id)
        if self._calls and use.calls >= self._calls:
            raise _exceeded(f"rollout {rollout_id} has made its {self._calls} calls")
        if self._tokens and use.tokens >= self._tokens:
            raise _exceeded(f"rollout {rollout_id} has used {use.tokens} tokens of {self._tokens}")
        if self._concurrency and use.running >= self._concurrency:
            raise Refusal(
                429,
                "rollout_concurrency",
                f"rollout {rollout_id} has {use.running} calls under way, {self._concurrency} are allowed",
                retry_after=1,
            )
        use.calls += 1
        use.running += 1
        while len(self._uses) > _REMEMBERED:
            self._uses.popitem(last=False)

    def spend(self, rollout_id: str, tokens: int) -> None:
        """A call has used so many tokens."""
        use = self._uses.get(rollout_id)
        if use is not None:
            use.tokens += tokens

    def leave(self, rollout_id: str) -> None:
        """A call has ended."""
        use = self._uses.get(rollout_id)
        if use is not None:
            use.running = max(0, use.running - 1)


def _exceeded(message: str) -> Refusal:
    return Refusal(429, "rollout_limit", message)

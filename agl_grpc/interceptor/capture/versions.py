"""Policy versions as runs over response tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class VersionRun:
    """Tokens ``start`` (inclusive) to ``end`` (exclusive) were sampled under ``policy_version``."""

    start: int
    end: int
    policy_version: int


def runs_from_starts(starts: Iterable[tuple[int, int]], tokens: int) -> list[VersionRun]:
    """Runs over `tokens` tokens from ``(policy version, index of its first token)`` pairs in order.

    Versions that sampled no token leave no run; neighbours of one version are one run.
    """
    pairs = [pair for pair in starts if pair[1] < tokens]
    runs: list[VersionRun] = []
    for index, (version, start) in enumerate(pairs):
        end = pairs[index + 1][1] if index + 1 < len(pairs) else tokens
        if end <= start:
            continue
        if runs and runs[-1].policy_version == version:
            runs[-1] = VersionRun(runs[-1].start, end, version)
        else:
            runs.append(VersionRun(start, end, version))
    return runs


def runs_from_engine(starts: Iterable[tuple[str, int]], tokens: int) -> list[VersionRun] | None:
    """The engine's own account, from its ``(label, first token)`` pairs; None when a label is no integer."""
    pairs = list(starts)
    if any(not label.isdigit() for label, _ in pairs):
        return None
    return runs_from_starts(((int(label), start) for label, start in pairs), tokens)


class ServedWeights:
    """Which weights an engine samples from: those of its model, or of each adapter by its name.

    A name that is neither, as an adapter's that vLLM was given by its own options, has the model's.
    """

    def __init__(self, model: str, policy_version: int, adapters: Iterable[str] = ()) -> None:
        self._model = model
        self._weights = {**dict.fromkeys(adapters, (0, "")), model: (policy_version, "")}

    def of(self, name: str) -> tuple[int, str]:
        """Version and digest of what samples under a name; the digest is empty for weights from disk."""
        return self._weights.get(name) or self._weights[self._model]

    def change(self, name: str, version: int, digest: str) -> None:
        """Other weights serve under a name."""
        self._weights[name] = (version, digest)

    def label(self) -> str:
        """What vLLM is told: the version.

        vLLM has one for all requests. Where adapters have each their own it is no number, so that vLLM's
        account of a sequence is left out.
        """
        if len(self._weights) == 1:
            return str(self._weights[self._model][0])
        return " ".join(
            f"{name}={version}" for name, (version, _) in self._weights.items() if name != self._model
        )

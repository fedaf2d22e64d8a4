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

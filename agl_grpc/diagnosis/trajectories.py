"""Which rollouts of a step are written down for people, and their form for programs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from agl_grpc.sample import AttemptFacts

FOLDER = "trajectories"
_LONGEST_CHARACTER = 8
Decode = Callable[[list[int]], str]
Numbers = npt.NDArray[Any]


class ShownRow(Protocol):
    """A row as the learner trains it; arrays have one entry a token of the response."""

    @property
    def prompt_ids(self) -> Numbers:
        """Tokens before the first sampled one."""

    @property
    def response_ids(self) -> Numbers:
        """Sampled tokens and what was observed between them."""

    @property
    def response_mask(self) -> Numbers:
        """1 = trained."""

    @property
    def logprobs(self) -> Numbers:
        """Sampling logprobs in nats."""

    @property
    def policy_versions(self) -> Numbers:
        """Optimiser step of the weights that sampled."""


class ShownRollout(Protocol):
    """A trained rollout: what is shown of it."""

    @property
    def rollout_id(self) -> str:
        """Its id."""

    @property
    def attempt_id(self) -> str:
        """Of the attempt that is trained."""

    @property
    def group_id(self) -> str:
        """Of its group."""

    @property
    def reward(self) -> float | None:
        """What is trained on."""

    @property
    def rows(self) -> Sequence[ShownRow]:
        """Its tokens."""

    @property
    def captured(self) -> int:
        """All tokens of its calls."""

    @property
    def observed(self) -> int:
        """Those that are masked."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Those that are in no row, by reason."""

    @property
    def facts(self) -> AttemptFacts:
        """Its verdicts."""


R = TypeVar("R", bound=ShownRollout)


def choose(rollouts: Sequence[R], count: int, seed: int) -> list[tuple[str, R]]:
    """``count`` best, worst and random rollouts each, and which of these each is; no rollout twice.

    Of equal rewards the smaller id comes first. The random ones are drawn from the others by ``seed``.
    """
    judged = [rollout for rollout in rollouts if rollout.reward is not None]
    ordered = sorted(judged, key=lambda rollout: (-(rollout.reward or 0.0), rollout.rollout_id))
    best = ordered[:count]
    rest = ordered[len(best) :]
    worst = rest[max(0, len(rest) - count) :][::-1] if count else []
    others = rest[: len(rest) - len(worst)]
    drawn = random.Random(seed).sample(others, min(count, len(others)))
    named = (("best", best), ("worst", worst), ("random", drawn))
    return [(why, rollout) for why, found in named for rollout in found]


def pieces(ids: Sequence[int], decode: Decode | None) -> Iterator[tuple[int, int, str]]:
    """Start, end and text of the shortest runs of tokens that are whole characters; ids without a decoder."""
    start = 0
    for end in range(1, len(ids) + 1):
        text = f"⟨{ids[start]}⟩" if decode is None else decode([int(each) for each in ids[start:end]])
        cut = text.endswith("\ufffd") and end - start < _LONGEST_CHARACTER
        if not cut or end == len(ids):
            yield start, end, text
            start = end


def record(step: int, why: str, rollout: ShownRollout, decode: Decode | None) -> dict[str, Any]:
    """A line of ``trajectories/step-N.jsonl``."""
    return {
        "step": step,
        "why": why,
        "rollout_id": rollout.rollout_id,
        "attempt_id": rollout.attempt_id,
        "group_id": rollout.group_id,
        "reward": rollout.reward,
        "verdicts": [
            {"grader": each.grader, "name": each.name, "value": each.value, "notes": dict(each.notes)}
            for each in rollout.facts.verdicts
        ],
        "tokens": {
            "captured": rollout.captured,
            "trained": sum(int(row.response_mask.sum()) for row in rollout.rows),
            "observed": rollout.observed,
            "dropped": dict(rollout.dropped),
        },
        "rows": [_row(row, decode) for row in rollout.rows],
    }


def _row(row: ShownRow, decode: Decode | None) -> dict[str, Any]:
    def text(ids: Numbers) -> str | None:
        return None if decode is None else decode(ids.tolist())

    return {
        "prompt": text(row.prompt_ids),
        "response": text(row.response_ids),
        "prompt_ids": row.prompt_ids.tolist(),
        "response_ids": row.response_ids.tolist(),
        "response_mask": row.response_mask.tolist(),
        "logprobs": np.round(row.logprobs.astype(np.float64), 6).tolist(),
        "policy_versions": row.policy_versions.tolist(),
    }


def write_step(
    folder: Path, step: int, chosen: Sequence[tuple[str, ShownRollout]], decode: Decode | None
) -> Path:
    """Writes ``trajectories/step-000012.jsonl`` and the page beside it (``.html``); answers the page."""
    from agl_grpc.diagnosis.pages import step_page

    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    lines = target / f"step-{step:06d}.jsonl"
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    lines.write_bytes(
        b"".join(
            orjson.dumps(record(step, why, each, decode), default=str, option=option) for why, each in chosen
        )
    )
    page = lines.with_suffix(".html")
    page.write_text(step_page(step, chosen, decode), encoding="utf-8", errors="replace")
    return page

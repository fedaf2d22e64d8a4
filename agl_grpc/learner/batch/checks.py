"""Proofs made on every batch before the optimiser may use it, and the account of where tokens went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agl_grpc.learner.errors import FidelityError
from agl_grpc.learner.rollouts.groups import BatchEntry, FinishedRollout, seal

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LogprobLimits:
    """Largest difference allowed between sampled and recomputed logprobs, in nats.

    The defaults are for fp32 engines and trainers (5e-7 was measured); bf16 needs about 0.3 and 0.02.
    """

    maximum: float = 1e-4
    mean: float = 1e-5


@dataclass(frozen=True)
class LogprobRow:
    """One row: sampled and recomputed logprobs and the policy version of every response token, with the
    mask.
    """

    key: str
    sampled: Array
    recomputed: Array
    mask: NDArray[np.int64]
    versions: NDArray[np.int64]


@dataclass(frozen=True)
class JoinedRows:
    """Rows one after the other: a call on them all costs what one on a single row does."""

    keys: list[str]
    ends: NDArray[np.int64]
    sampled: Array
    recomputed: Array
    mask: NDArray[np.int64]
    versions: NDArray[np.int64]

    def row_of(self, token: np.integer[Any]) -> str:
        """Key of the row that holds a token."""
        return self.keys[int(np.searchsorted(self.ends, token, side="right"))]


def join_rows(rows: Iterable[LogprobRow]) -> JoinedRows:
    """The rows of a batch, joined; of none, too."""
    of = list(rows)
    none = np.zeros(0, dtype=np.int64)
    return JoinedRows(
        keys=[row.key for row in of],
        ends=np.cumsum([len(row.mask) for row in of], dtype=np.int64),
        sampled=np.concatenate([none.astype(np.float32), *(row.sampled for row in of)]),
        recomputed=np.concatenate([none.astype(np.float32), *(row.recomputed for row in of)]),
        mask=np.concatenate([none, *(row.mask for row in of)]),
        versions=np.concatenate([none, *(row.versions for row in of)]),
    )


def check_logprobs(rows: Iterable[LogprobRow], *, version: int, limits: LogprobLimits) -> dict[str, float]:
    """Compares the logprobs of all trained tokens that were sampled under ``version``, the weights in force.

    Tokens of other versions cannot be recomputed from these weights; they are counted, not compared.
    ``check/kl_sampler_trainer`` is the mean of exp(d) - 1 - d with d = recomputed - sampled: an estimate,
    never negative, of the divergence of the sampler from the trainer (Schulman 2020, "k3"), in nats.

    Raises:
        FidelityError: a difference above the limits, or a token from a version that does not exist yet.
    """
    batch = join_rows(rows)
    trained = batch.mask.astype(bool)
    too_new = np.flatnonzero(trained & (batch.versions > version))
    if len(too_new):
        raise FidelityError(
            f"row {batch.row_of(too_new[0])} holds tokens of policy version {batch.versions[too_new].max()}, "
            f"but the trainer is at {version}"
        )
    same = np.flatnonzero(trained & (batch.versions == version))
    compared = len(same)
    change = batch.recomputed[same] - batch.sampled[same].astype(np.float64)
    difference = np.abs(change)
    unknown = np.flatnonzero(~np.isfinite(difference))
    if len(unknown):
        raise FidelityError(f"row {batch.row_of(same[unknown[0]])} has a logprob that is not a finite number")
    total, divergence = float(difference.sum()), float((np.expm1(change) - change).sum())
    worst_at = int(difference.argmax()) if compared else 0
    worst = float(difference[worst_at]) if compared else 0.0
    mean = total / compared if compared else 0.0
    if worst > limits.maximum or mean > limits.mean:
        raise FidelityError(
            f"sampled and recomputed logprobs differ under policy version {version}: max {worst:.3g} (limit "
            f"{limits.maximum:g}) in row {batch.row_of(same[worst_at])}, mean {mean:.3g} "
            f"(limit {limits.mean:g}) over {compared} tokens; the engine computes in another "
            "precision (vLLM's --dtype) or with other weights, or `checks` is too narrow for this hardware"
        )
    return {
        "check/logprob_max_difference": worst,
        "check/logprob_mean_difference": mean,
        "check/kl_sampler_trainer": divergence / compared if compared else 0.0,
        "check/logprob_tokens_compared": float(compared),
        "check/logprob_tokens_of_older_versions": float(trained.sum() - compared),
    }


def staleness(rows: Iterable[LogprobRow], *, version: int) -> dict[str, float]:
    """How many trained tokens each older version has sampled: ``staleness/tokens/N`` = N versions behind.

    ``staleness/tokens/unknown`` counts tokens of weights that are none of this trainer's.
    """
    batch = join_rows(rows)
    found, counts = np.unique(batch.versions[batch.mask.astype(bool)], return_counts=True)
    behind: Counter[str] = Counter()
    for sampled_by, count in zip(found.tolist(), counts.tolist(), strict=True):
        behind[str(version - sampled_by) if sampled_by >= 0 else "unknown"] += count
    return {f"staleness/tokens/{age}": float(count) for age, count in behind.items()}


# Rows that begin here because of what agent and template did to the tokens, not because there are several.
_WHOLE = frozenset({"first", "branch"})


def row_starts(rollouts: Iterable[FinishedRollout]) -> dict[str, float]:
    """Why the rows of a batch began: ``rows/start/REASON``, and ``rows/breaks``, those that a broken
    conversation began.

    ``reward/unplaced`` counts rewards of steps or calls that are none of the trained answers.
    """
    starts: Counter[str] = Counter()
    unplaced = 0
    for rollout in rollouts:
        starts.update(rollout.row_starts)
        unplaced += rollout.unplaced_rewards
    metrics = {f"rows/start/{reason}": float(count) for reason, count in starts.items()}
    metrics["rows/breaks"] = float(sum(count for reason, count in starts.items() if reason not in _WHOLE))
    metrics["reward/unplaced"] = float(unplaced)
    return metrics


@dataclass(frozen=True)
class SealedRow:
    """What the trainer holds for a row just before the update."""

    key: str
    rollout_id: str
    group_id: str
    reward: float


def check_seals(rows: Sequence[SealedRow], entries: Iterable[BatchEntry]) -> dict[str, float]:
    """Compares (rollout, reward, group) of every row with what the claimed batch says.

    Raises:
        FidelityError: a row whose rollout, group or reward is another's, or a rollout without a row.
    """
    expected = {entry.rollout_id: entry for entry in entries}
    seen: set[str] = set()
    for row in rows:
        entry = expected.get(row.rollout_id)
        if entry is None:
            raise FidelityError(
                f"row {row.key} belongs to rollout {row.rollout_id!r}, which is not in the batch"
            )
        seen.add(row.rollout_id)
        if seal(row.rollout_id, row.group_id, row.reward) != seal(
            entry.rollout_id, entry.group_id, entry.reward
        ):
            raise FidelityError(
                f"row {row.key} of rollout {row.rollout_id} would be trained with group {row.group_id!r} and "
                f"reward "
                f"{row.reward!r}; the batch says group {entry.group_id!r} and reward {entry.reward!r}"
            )
        uid, number, _ = row.key.rsplit("_", 2)
        name = f"{uid}.n{number}"
        if uid != row.group_id or (row.rollout_id != name and not row.rollout_id.startswith(f"{name}.r")):
            raise FidelityError(f"row {row.key} carries rollout {row.rollout_id!r} of group {row.group_id!r}")
    missing = expected.keys() - seen
    if missing:
        raise FidelityError(f"rollout {min(missing)} is in the batch but has no row ({len(missing)} in all)")
    return {"check/sealed_rows": float(len(rows))}


def account(rollouts: Iterable[FinishedRollout], trained_by_rollout: Mapping[str, int]) -> dict[str, float]:
    """Where the captured tokens went, as metrics: captured = trained + observed + dropped, for each rollout.

    Args:
        rollouts: the rollouts of the batch.
        trained_by_rollout: mask-1 tokens that reach the optimiser, counted on the rows themselves.

    Raises:
        FidelityError: the identity does not hold for a rollout.
    """
    captured = trained = observed = 0
    dropped: Counter[str] = Counter()
    for rollout in rollouts:
        mine = trained_by_rollout.get(rollout.rollout_id, 0)
        lost = sum(rollout.dropped.values())
        if rollout.captured != mine + rollout.observed + lost:
            raise FidelityError(
                f"tokens of rollout {rollout.rollout_id} are not accounted for: captured {rollout.captured}, "
                f"trained "
                f"{mine}, observed {rollout.observed}, dropped {lost}"
            )
        captured, trained, observed = captured + rollout.captured, trained + mine, observed + rollout.observed
        dropped.update(rollout.dropped)
    metrics = {"tokens/captured": captured, "tokens/trained": trained, "tokens/observed": observed}
    metrics.update({f"tokens/dropped/{reason}": count for reason, count in dropped.items()})
    metrics["tokens/dropped"] = sum(dropped.values())
    metrics["tokens/unaccounted"] = captured - trained - observed - sum(dropped.values())
    return {name: float(value) for name, value in metrics.items()}

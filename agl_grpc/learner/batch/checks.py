"""Proofs made on every batch before the optimiser may use it, and the account of where tokens went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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


def check_logprobs(rows: Iterable[LogprobRow], *, version: int, limits: LogprobLimits) -> dict[str, float]:
    """Compares the logprobs of all trained tokens that were sampled under ``version``, the weights in force.

    Tokens of other versions cannot be recomputed from these weights; they are counted, not compared.
    ``check/kl_sampler_trainer`` is the mean of exp(d) - 1 - d with d = recomputed - sampled: an estimate,
    never negative, of the divergence of the sampler from the trainer (Schulman 2020, "k3"), in nats.

    Raises:
        FidelityError: a difference above the limits, or a token from a version that does not exist yet.
    """
    worst, worst_key, total, divergence, compared, older = 0.0, "", 0.0, 0.0, 0, 0
    for row in rows:
        trained = row.mask.astype(bool)
        newest = int(row.versions[trained].max(initial=-1))
        if newest > version:
            raise FidelityError(
                f"row {row.key} holds tokens of policy version {newest}, but the trainer is at {version}"
            )
        same = trained & (row.versions == version)
        older += int(trained.sum() - same.sum())
        change = row.recomputed[same] - row.sampled[same].astype(np.float64)
        difference = np.abs(change)
        if not np.isfinite(difference).all():
            raise FidelityError(f"row {row.key} has a logprob that is not a finite number")
        if len(difference) and difference.max() >= worst:
            worst, worst_key = float(difference.max()), row.key
        total += float(difference.sum())
        divergence += float((np.expm1(change) - change).sum())
        compared += len(difference)
    mean = total / compared if compared else 0.0
    if worst > limits.maximum or mean > limits.mean:
        raise FidelityError(
            f"sampled and recomputed logprobs differ under policy version {version}: max {worst:.3g} (limit "
            f"{limits.maximum:g}) in row {worst_key}, mean {mean:.3g} (limit {limits.mean:g}) over "
            f"{compared} tokens"
        )
    return {
        "check/logprob_max_difference": worst,
        "check/logprob_mean_difference": mean,
        "check/kl_sampler_trainer": divergence / compared if compared else 0.0,
        "check/logprob_tokens_compared": float(compared),
        "check/logprob_tokens_of_older_versions": float(older),
    }


def staleness(rows: Iterable[LogprobRow], *, version: int) -> dict[str, float]:
    """How many trained tokens each older version has sampled: ``staleness/tokens/N`` = N versions behind.

    ``staleness/tokens/unknown`` counts tokens of weights that are none of this trainer's.
    """
    behind: Counter[str] = Counter()
    for row in rows:
        for found, count in zip(
            *np.unique(row.versions[row.mask.astype(bool)], return_counts=True), strict=True
        ):
            behind[str(version - int(found)) if found >= 0 else "unknown"] += int(count)
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

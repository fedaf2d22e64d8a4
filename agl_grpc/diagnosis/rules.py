"""The alarms: each looks at the history of a run's metrics and says what is wrong, if anything is.

A rule is a pure function of the steps so far, the last one being judged. A metric that is not reported
raises nothing. What is said to people has numbers in it, and one thing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from agl_grpc.diagnosis.limits import AlarmLimits

Steps = Sequence[Mapping[str, float]]

REWARD, ENTROPY, LENGTH = "reward/mean", "loss/entropy", "response_length/mean"
TRUNCATED, DEAD = "answers/truncated", "reward/groups_without_variance"
KL, SKIPPED, STEP = "kl/sampler_trainer_k3", "loss/skipped_updates", "time/step"
ENGINE_IDLE, OPTIMISER_IDLE = "idle/engine_seconds", "idle/optimiser_seconds"


class Finding(NamedTuple):
    """What is seen, with numbers, and what to do: a sentence each."""

    seen: str
    advice: str


Rule = Callable[[Steps, AlarmLimits], Finding | None]


def _values(history: Steps, name: str) -> list[float]:
    return [step[name] for step in history if name in step]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ends(history: Steps, name: str, window: int) -> tuple[float, float] | None:
    """Means of the first and of the last window, which do not overlap; None with too few steps, or where the
    last step does not say."""
    values = _values(history, name)
    if len(values) < 2 * window or name not in history[-1]:
        return None
    return _mean(values[:window]), _mean(values[-window:])


def _last(history: Steps, name: str, window: int) -> float | None:
    """The mean of the last window; None with too few steps, or where the last step does not say."""
    values = _values(history, name)
    return _mean(values[-window:]) if len(values) >= window and name in history[-1] else None


def _reward_hacking(history: Steps, limits: AlarmLimits) -> Finding | None:
    judges = dict.fromkeys(name for step in history for name in step if name.startswith("validation/"))
    for name in (*judges, *limits.held_out):
        measured = [(at, step[name]) for at, step in enumerate(history) if name in step]
        if len(measured) < 2:
            continue
        smooth = 1 if name in judges else limits.window
        # Validation is a mean over a data set; a batch's mean of a grader is as noisy as its reward.
        means = [
            (measured[end - 1][0], _mean([value for _, value in measured[end - smooth : end]]))
            for end in range(smooth, len(measured) + 1)
        ]
        if len(means) < 2:
            continue
        (best_at, best), (_, now) = max(means, key=lambda pair: pair[1]), means[-1]
        before = _values(history[: best_at + 1], REWARD)[-limits.window :]
        after = _values(history, REWARD)[-limits.window :]
        if not before or not after:
            continue
        rise, fall = _mean(after) - _mean(before), best - now
        if rise >= limits.reward_rise and fall >= limits.held_out_fall:
            return Finding(
                f"the reward rose from {_mean(before):.3f} to {_mean(after):.3f} while {name} fell from "
                f"{best:.3f} to {now:.3f}",
                "read the best trajectories for what the reward overlooks, mend the grader, and go back to "
                "the checkpoint with the best validation",
            )
    return None


def _entropy_collapse(history: Steps, limits: AlarmLimits) -> Finding | None:
    ends = _ends(history, ENTROPY, limits.window)
    if ends is None or ends[1] >= max(limits.entropy_floor, limits.entropy_share * ends[0]):
        return None
    return Finding(
        f"the policy's entropy fell from {ends[0]:.3g} to {ends[1]:.3g} nats a token: its answers are nearly "
        "always the same",
        "lower the learning rate, raise actor.entropy_coeff or actor.clip_ratio_high, or stop here if the "
        "reward is good",
    )


def _length_runaway(history: Steps, limits: AlarmLimits) -> Finding | None:
    truncated = _last(history, TRUNCATED, limits.window)
    ends = _ends(history, LENGTH, limits.window)
    advice = (
        "raise max_tokens if the answers need it, otherwise let length cost reward, or set samples.truncated "
        "to drop"
    )
    if truncated is not None and truncated > limits.truncated_share:
        return Finding(f"{truncated:.0%} of the answers were cut off by the length limit", advice)
    if ends is not None and ends[0] > 0 and ends[1] > limits.length_factor * ends[0]:
        return Finding(f"responses grew from {ends[0]:.0f} to {ends[1]:.0f} tokens", advice)
    return None


def _dead_groups(history: Steps, limits: AlarmLimits) -> Finding | None:
    share = _last(history, DEAD, limits.window)
    if share is None or share <= limits.dead_share:
        return None
    reward = _last(history, REWARD, 1)
    said = "" if reward is None else f", at a mean reward of {reward:.3f}"
    return Finding(
        f"in {share:.0%} of the groups all rollouts had the same reward{said}: they teach nothing",
        "choose tasks that are sometimes solved, make groups larger, raise the temperature, or set "
        "algorithm.filter_groups",
    )


def _sampler_disagrees(history: Steps, limits: AlarmLimits) -> Finding | None:
    distance = history[-1].get(KL)
    if distance is None or distance <= limits.kl:
        return None
    return Finding(
        f"the trainer's probabilities differ from the sampler's by a KL of {distance:.3g} nats a token, for "
        "tokens of the same weights",
        "use one precision in engine and trainer, check chat template, temperature and the engine's version, "
        "or correct with algorithm.rollout_correction",
    )


def _skipped_updates(history: Steps, limits: AlarmLimits) -> Finding | None:
    skipped = history[-1].get(SKIPPED, 0.0)
    if not skipped:
        return None
    total = sum(_values(history, SKIPPED))
    return Finding(
        f"{skipped:.0f} optimiser updates of this step were skipped because the gradient was not finite "
        f"({total:.0f} so far)",
        "lower the learning rate or train in float32, and look for rewards and logprobs of extreme size in "
        "this step's trajectories",
    )


def _idle(history: Steps, name: str, limits: AlarmLimits) -> tuple[float, float] | None:
    """Share of the last window's time that was idle, and idle seconds a step, when that is too much.

    The first step pays for what is started once, so it says nothing.
    """
    steps = [step for step in history[1:] if name in step and step.get(STEP, 0.0) > 0.0][-limits.window :]
    if len(steps) < limits.window or name not in history[-1]:
        return None
    idle = sum(step[name] for step in steps)
    share, seconds = min(1.0, idle / sum(step[STEP] for step in steps)), idle / len(steps)
    return (share, seconds) if share > limits.idle_share and seconds >= limits.idle_seconds else None


def _engine_starved(history: Steps, limits: AlarmLimits) -> Finding | None:
    found = _idle(history, ENGINE_IDLE, limits)
    if found is None:
        return None
    return Finding(
        f"the engines had nothing to do for {found[0]:.0%} of the time, {found[1]:.1f} s a step",
        "sample ahead (trainer.v1.separate_async.num_warmup_batches), or give the learner the engines' "
        "devices",
    )


def _optimiser_starved(history: Steps, limits: AlarmLimits) -> Finding | None:
    found = _idle(history, OPTIMISER_IDLE, limits)
    if found is None:
        return None
    return Finding(
        f"the optimiser waited for rollouts for {found[0]:.0%} of the time, {found[1]:.1f} s a step",
        "start more workers or engines, raise the workers' concurrency, or sample ahead "
        "(trainer.v1.separate_async.num_warmup_batches)",
    )


RULES: Mapping[str, Rule] = {
    "reward_hacking": _reward_hacking,
    "entropy_collapse": _entropy_collapse,
    "length_runaway": _length_runaway,
    "dead_groups": _dead_groups,
    "sampler_disagrees": _sampler_disagrees,
    "skipped_updates": _skipped_updates,
    "engine_starved": _engine_starved,
    "optimiser_starved": _optimiser_starved,
}
"""All alarms by name."""

AT_ONCE = frozenset({"skipped_updates", "sampler_disagrees"})
"""Alarms that one step is enough for."""

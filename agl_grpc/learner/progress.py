"""One line a step for people, and the few numbers that every learner reports under the same names."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Names under which any learner reports, from verl's names.
_SUMMARY = {
    "time/step": "timing_s/step",
    "time/rollout": "timing_s/gen",
    "time/logprobs": "timing_s/old_log_prob",
    "time/advantage": "timing_s/adv",
    "time/update": "timing_s/update_actor",
    "time/publish": "timing_s/update_weights",
    "time/save": "timing_s/save_checkpoint",
    "staleness/mean": "training/off_policy/trajectory_staleness/mean",
    "staleness/max": "training/off_policy/trajectory_staleness/max",
    "loss/gradient_norm": "actor/grad_norm",
    "loss/entropy": "actor/entropy",
    "loss/kl_old_new": "actor/ppo_kl",
    "loss/clip_fraction": "actor/pg_clipfrac",
    "loss/learning_rate": "actor/lr",
}
# What a learner's line of progress begins with.
SAID = "learner: "
_SCORE = re.compile(r"val-core/(.+)/reward/mean@\d+")
_PHASES = ("rollout", "logprobs", "advantage", "update", "publish", "save")


def with_summary(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with the summary names added; ``validation/SOURCE`` is a data source's mean reward."""
    added = {name: metrics[source] for name, source in _SUMMARY.items() if source in metrics}
    for name, value in metrics.items():
        if score := _SCORE.fullmatch(name):
            added[f"validation/{score[1]}"] = value
    return {**metrics, **added}


def scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """Validation scores by data source."""
    prefix = "validation/"
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def step_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """For example ``step 3/40  reward 0.41  tokens 5120  stale 0.0  1.9 s (rollout 0.8, update 0.5, …)``."""
    found = ", ".join(f"{name} {value:.3f}" for name, value in scores(metrics).items())
    if step == 0 or "reward/mean" not in metrics:
        return f"step {step}/{total}  validation: {found or 'no scores'}"
    phases = ", ".join(
        f"{name} {metrics[f'time/{name}']:.2f}"
        for name in _PHASES
        if metrics.get(f"time/{name}", 0.0) >= 0.005
    )
    line = (
        f"step {step}/{total}  reward {metrics['reward/mean']:.3f}  tokens {metrics['tokens/trained']:.0f}  "
        f"stale {metrics.get('staleness/mean', 0.0):.1f}  {metrics.get('time/step', 0.0):.2f} s ({phases})"
    )
    return f"{line}  validation: {found}" if found else line

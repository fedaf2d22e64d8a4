"""The reward curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from agl_grpc.learner.progress import scores
from agl_grpc.model.training import StepMetrics
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.run_folder import RunFolder

_SPAN = 5


class ChartsMissing(Exception):
    """matplotlib is not installed."""


def draw_rewards(
    path: Path, history: Sequence[StepMetrics], validation: Mapping[int, Mapping[str, float]], title: str
) -> None:
    """Writes the batches' mean reward by step, its running mean, and the validation scores as points.

    Args:
        path: the PNG.
        history: all steps.
        validation: scores by name, by the step after which they were measured.
        title: above the picture.

    Raises:
        ChartsMissing: there is no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartsMissing("the reward curve needs matplotlib: pip install 'agl-grpc[train]'") from error
    points = [step for step in history if "reward/mean" in step.metrics]
    steps = [point.step for point in points]
    means = [point.metrics["reward/mean"] for point in points]
    running = [_mean(means[max(0, at - _SPAN) : at]) for at in range(1, len(means) + 1)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, means, alpha=0.35, label="training reward, mean of the batch")
    axes.plot(steps, running, color="C0", linewidth=2, label=f"mean of the last {_SPAN} batches")
    names = dict.fromkeys(name for measured in validation.values() for name in measured)
    for name, marker in zip(names, "osD^v", strict=False):
        at = [step for step, scores in validation.items() if name in scores]
        scores = [validation[step][name] for step in at]
        axes.plot(at, scores, marker, markersize=9, label=f"validation, {name}")
    axes.set(title=title, xlabel="step", ylabel="reward")
    axes.set_ylim(min(-0.02, *means), max(1.02, *means))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, dpi=130)


def draw_history(folder: RunFolder, history: Sequence[StepMetrics], progress: Progress) -> None:
    """Draws ``reward.png`` of a run whose validation scores are metrics; nothing without rewards."""
    if not any("reward/mean" in item.metrics for item in history):
        return
    points = {item.step: found for item in history if (found := scores(item.metrics))}
    try:
        draw_rewards(folder.path / "reward.png", history, points, f"{folder.name}: reward")
    except ChartsMissing as missing:
        progress.say(str(missing))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

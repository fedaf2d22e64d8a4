"""The reward curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from agl_grpc.model.training import StepMetrics


class ChartsMissing(Exception):
    """matplotlib is not installed."""


def draw_rewards(
    path: Path, history: Sequence[StepMetrics], validation: Mapping[int, Mapping[str, float]], title: str
) -> None:
    """Writes mean reward (and its spread) by step, and the validation scores as points.

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
    spreads = [point.metrics.get("reward/std", 0.0) for point in points]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(steps, low, high, alpha=0.15, linewidth=0, label="± one standard deviation")
    axes.plot(steps, means, label="training reward (mean of the batch)")
    names = dict.fromkeys(name for scores in validation.values() for name in scores)
    for name, marker in zip(names, "osD^v", strict=False):
        at = [step for step, scores in validation.items() if name in scores]
        axes.plot(
            at, [validation[step][name] for step in at], marker, linestyle=":", label=f"validation, {name}"
        )
    axes.set(title=title, xlabel="step", ylabel="reward")
    axes.set_ylim(min(-0.02, *means), max(1.02, *means))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, dpi=130)

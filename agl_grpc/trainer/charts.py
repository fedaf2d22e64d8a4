"""Curves of a run as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agl_grpc.learner.progress import scores
from agl_grpc.model.training import StepMetrics
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPAN = 5
_MOST_CURVES = 12
_COLUMNS = 3
_NO_CURVE = ("alarm/", "time/", "reward/mean")


class ChartsMissing(Exception):
    """matplotlib is not installed."""


def draw_rewards(
    path: Path,
    histories: Mapping[str, Sequence[StepMetrics]],
    validation: Mapping[int, Mapping[str, float]],
    title: str,
) -> None:
    """Writes the batches' mean reward by step, its running mean, and the validation scores as points.

    Args:
        path: the PNG.
        histories: all steps, by the model that they trained; the name is empty where there is only one.
        validation: scores by name, by the step after which they were measured.
        title: above the picture.

    Raises:
        ChartsMissing: there is no matplotlib.
    """
    figure = _figure((8, 4.5))
    axes = figure.add_subplot()
    lowest, highest = -0.02, 1.02
    for number, (name, history) in enumerate(histories.items()):
        points = [step for step in history if "reward/mean" in step.metrics]
        steps = [point.step for point in points]
        means = [point.metrics["reward/mean"] for point in points]
        running = [_mean(means[max(0, at - _SPAN) : at]) for at in range(1, len(means) + 1)]
        whose, colour = f"{name}: " if name else "", f"C{number}"
        axes.plot(steps, means, alpha=0.35, label=f"{whose}training reward, mean of the batch")
        axes.plot(steps, running, color=colour, linewidth=2, label=f"{whose}mean of the last {_SPAN} batches")
        lowest, highest = min(lowest, *means), max(highest, *means)
    names = dict.fromkeys(name for measured in validation.values() for name in measured)
    for name, marker in zip(names, "osD^v", strict=False):
        at = [step for step, scores in validation.items() if name in scores]
        scores = [validation[step][name] for step in at]
        axes.plot(at, scores, marker, markersize=9, label=f"validation, {name}")
    axes.set(title=title, xlabel="step", ylabel="reward")
    axes.set_ylim(lowest, highest)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, dpi=130)


def draw_metrics(path: Path, history: Sequence[StepMetrics], title: str) -> None:
    """Writes a small curve by step of each number that was reported, at most twelve; none = no picture.

    Raises:
        ChartsMissing: there is no matplotlib.
    """
    reported = dict.fromkeys(name for item in history for name in item.metrics)
    names = [name for name in reported if not name.startswith(_NO_CURVE)][:_MOST_CURVES]
    if not names:
        return
    rows = -(-len(names) // _COLUMNS)
    figure = _figure((4 * _COLUMNS, 2.6 * rows))
    figure.suptitle(title)
    for place, name in enumerate(names, start=1):
        steps = [item for item in history if name in item.metrics]
        axes = figure.add_subplot(rows, _COLUMNS, place)
        axes.plot([item.step for item in steps], [item.metrics[name] for item in steps], marker=".")
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _figure(size: tuple[float, float]) -> Figure:
    """An empty picture, so many inches wide and high."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartsMissing("curves need matplotlib: pip install 'agl-grpc[train]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_history(folder: RunFolder, history: Sequence[StepMetrics], progress: Progress) -> None:
    """Draws ``reward.png`` and, of the other numbers, ``metrics.png``, as far as there are any."""
    points = {item.step: found for item in history if (found := scores(item.metrics))}
    try:
        if any("reward/mean" in item.metrics for item in history):
            draw_rewards(folder.path / "reward.png", {"": history}, points, f"{folder.name}: reward")
        draw_metrics(folder.path / "metrics.png", history, folder.name)
    except ChartsMissing as missing:
        progress.say(str(missing))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

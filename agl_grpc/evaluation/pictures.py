"""Pictures of a report, as SVG: they need no other file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from agl_grpc.evaluation.comparison import Comparison
from agl_grpc.evaluation.result import ALL, Evaluation, Figures


class PicturesMissing(Exception):
    """matplotlib is not installed."""


def draw(evaluations: Sequence[Evaluation], comparison: Comparison | None = None) -> dict[str, str]:
    """SVG texts by name: ``reward`` (mean of each data source with its interval), ``pass_at_k``, ``tasks``
    (how many tasks have which mean reward), and for two evaluations ``difference`` (task by task).

    Raises:
        PicturesMissing: there is no matplotlib.
    """
    pictures = {"reward": _rewards(evaluations), "tasks": _tasks(evaluations)}
    if any(len(each.ks) > 1 for each in evaluations):
        pictures["pass_at_k"] = _pass_at_k(evaluations)
    if comparison is not None:
        pictures["difference"] = _difference(comparison)
    return pictures


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PicturesMissing("pictures need matplotlib: pip install 'agl-grpc[train]'") from error
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _legend(figure: Any, axes: Any) -> None:
    """Below the picture, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    written = io.StringIO()
    # No date, and no random ids: the same figures give the same file.
    with rc_context({"svg.hashsalt": "agl-grpc"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def _rewards(evaluations: Sequence[Evaluation]) -> str:
    figure, axes = _figure()
    width = 0.8 / len(evaluations)
    names = sorted({name for each in evaluations for name in each.sources})
    names = [ALL, *names] if len(names) > 1 else [ALL]
    for number, each in enumerate(evaluations):
        found = [each.figures if name == ALL else each.sources.get(name) for name in names]
        shown = [(place, one) for place, one in enumerate(found) if one and one.mean is not None]
        at = [place + (number - (len(evaluations) - 1) / 2) * width for place, _ in shown]
        means = [one.mean for _, one in shown]
        axes.bar(at, means, width * 0.9, yerr=_errors([one for _, one in shown]), capsize=4, label=each.name)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="mean reward", title="Mean reward, with 95 % intervals over tasks")
    _legend(figure, axes)
    return _svg(figure)


def _errors(found: Sequence[Figures]) -> list[list[float]]:
    below, above = [], []
    for one in found:
        mean = one.mean or 0.0
        below.append(mean - one.interval.low if one.interval else 0.0)
        above.append(one.interval.high - mean if one.interval else 0.0)
    return [below, above]


def _pass_at_k(evaluations: Sequence[Evaluation]) -> str:
    figure, axes = _figure()
    for each in evaluations:
        points = [(k, value) for k, value in each.figures.pass_at.items() if value is not None]
        axes.plot([k for k, _ in points], [value for _, value in points], "o-", label=each.name)
    axes.set_xticks(sorted({k for each in evaluations for k in each.ks}))
    axes.set(xlabel="k", ylabel="pass@k", title="At least one of k answers is right", ylim=(-0.02, 1.02))
    _legend(figure, axes)
    return _svg(figure)


def _tasks(evaluations: Sequence[Evaluation]) -> str:
    figure, axes = _figure()
    means = [[task.mean for task in each.tasks if task.mean is not None] for each in evaluations]
    bins = min(20, max(each.samples for each in evaluations) + 1)
    axes.hist(means, bins=max(2, bins), label=[each.name for each in evaluations])
    axes.set(xlabel="mean reward of a task", ylabel="tasks", title="Tasks by their mean reward")
    _legend(figure, axes)
    return _svg(figure)


def _difference(comparison: Comparison) -> str:
    figure, axes = _figure()
    tests = {ALL: comparison.total, **comparison.sources}
    for place, test in enumerate(tests.values()):
        low, high = (test.interval.low, test.interval.high) if test.interval else (test.difference,) * 2
        axes.plot([low, high], [place, place], "C0-", linewidth=3)
        axes.plot([test.difference], [place], "C0o", markersize=9)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(tests)), list(tests))
    axes.invert_yaxis()
    axes.set(xlabel="difference of mean rewards", title=f"{comparison.second} less {comparison.first}")
    axes.margins(y=0.4)
    return _svg(figure)

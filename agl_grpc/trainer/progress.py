"""What a training run shows while it runs: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from agl_grpc.learner.progress import scores

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

PHASES = ("rollout", "logprobs", "advantage", "update", "publish", "save")
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60
_OTHERS_SHOWN = 4
_NOT_SHOWN = ("alarm/", "time/")
_REFRESHES_PER_SECOND = 4


def step_line(step: int, total: int | None, metrics: Mapping[str, float]) -> str:
    """For example ``step 3/40  reward 0.41  tokens 5120  stale 0.0  1.90 s (rollout 0.80, update 0.50)``.

    An algorithm that reports no reward is shown by the first numbers that it does report.
    """
    phases = ", ".join(
        f"{name} {metrics[f'time/{name}']:.2f}"
        for name in PHASES
        if metrics.get(f"time/{name}", 0.0) >= 0.005
    )
    parts = [f"step {step}/{total}" if total else f"step {step}"]
    if "reward/mean" in metrics:
        parts.append(f"reward {metrics['reward/mean']:.3f}")
    else:
        parts += _others(metrics)
    if "tokens/trained" in metrics:
        parts.append(f"tokens {metrics['tokens/trained']:.0f}")
    if "staleness/mean" in metrics:
        parts.append(f"stale {metrics['staleness/mean']:.1f}")
    if "time/step" in metrics:
        parts.append(f"{metrics['time/step']:.2f} s" + (f" ({phases})" if phases else ""))
    parts += [f"validation {name} {value:.3f}" for name, value in scores(metrics).items()]
    return "  ".join(parts)


def _others(metrics: Mapping[str, float]) -> list[str]:
    shown = {**scores(metrics), "tokens/trained": 0.0, "staleness/mean": 0.0}
    names = [name for name in metrics if name not in shown and not name.startswith(_NOT_SHOWN)]
    return [f"{name} {metrics[name]:.4g}" for name in names[:_OTHERS_SHOWN]]


def curve(rewards: Sequence[float], width: int = _CURVE_WIDTH) -> str:
    """Rewards as a line of bars from 0 (or the lowest, when below) to 1 (or the highest, when above)."""
    if not rewards:
        return ""
    low, high = min(0.0, *rewards), max(1.0, *rewards)
    # Wide runs are averaged down, so that the whole curve is seen.
    size = max(1, -(-len(rewards) // width))
    means = [
        sum(part) / len(part) for part in (rewards[at : at + size] for at in range(0, len(rewards), size))
    ]
    return "".join(
        _BARS[min(len(_BARS) - 1, int((value - low) / (high - low) * len(_BARS)))] for value in means
    )


class Progress:
    """Shows a run's progress; use it as a context manager. Calls may come from any thread.

    Args:
        name: of the run.
        stream: where to; a terminal gets a live picture.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name = name
        self._stream = stream or sys.stdout
        self._live: Live | None = None
        self._began = time.monotonic()
        self._phase = "starting"
        self._lines: dict[str, str] = {}
        self._done: tuple[int, int | None] = (0, None)
        self._rewards: dict[str, list[float]] = {}

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            self._live = Live(
                get_renderable=self._picture, console=console, refresh_per_second=_REFRESHES_PER_SECOND
            )
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        stamped = f"[{time.monotonic() - self._began:6.1f} s] {text}"
        if self._live is not None:
            self._live.console.print(stamped, highlight=False, markup=False)
        else:
            print(stamped, file=self._stream, flush=True)

    def phase(self, text: str) -> None:
        """What the run does now."""
        self._phase = text
        if self._live is None:
            self.say(text)

    def count(self, done: int, of: int) -> None:
        """How far the phase is; shown on a terminal only."""
        self._done = (done, of)

    def step(self, step: int, total: int | None, metrics: Mapping[str, float], model: str = "") -> None:
        """A finished training step, of one ``model`` where several are trained."""
        if "reward/mean" in metrics:
            self._rewards.setdefault(model, []).append(metrics["reward/mean"])
        self._done = (step, total)
        self._lines[model] = (f"{model}: " if model else "") + step_line(step, total, metrics)
        if self._live is None:
            self.say(self._lines[model])

    def _picture(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        done, total = self._done
        lines: list[Text | ProgressBar] = [
            Text.assemble((self._name, "bold"), f"  {self._phase}  {time.monotonic() - self._began:.0f} s")
        ]
        if total:
            lines.append(ProgressBar(total=total, completed=done, width=_CURVE_WIDTH))
        for model, rewards in self._rewards.items():
            whose = f"{model}: reward" if model else "reward"
            lines.append(Text(f"{whose} {curve(rewards)} {rewards[-1]:.3f}"))
        lines += [Text(line, style="dim") for line in self._lines.values()]
        return Group(*lines)

"""What people see: lines where no terminal is, a live picture where one is, a curve as a file."""

from __future__ import annotations

import io
from pathlib import Path

from agl_grpc.learner.progress import step_line as learner_line
from agl_grpc.learner.progress import with_summary
from agl_grpc.model.training import StepMetrics
from agl_grpc.trainer.charts import draw_metrics, draw_rewards
from agl_grpc.trainer.progress import Progress, curve, step_line

METRICS = {
    "reward/mean": 0.5,
    "tokens/trained": 1234.0,
    "staleness/mean": 0.25,
    "time/step": 2.5,
    "time/rollout": 1.5,
    "time/update": 0.75,
    "time/save": 0.001,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_one_line() -> None:
    expected = "step 3/40  reward 0.500  tokens 1234  stale 0.2  2.50 s (rollout 1.50, update 0.75)"
    assert step_line(3, 40, METRICS) == expected
    assert step_line(3, None, {}) == "step 3"


def test_the_curve_runs_from_empty_to_full() -> None:
    assert curve([0.0, 0.5, 1.0]) == "▁▅█"
    assert curve([]) == ""
    assert len(curve([0.5] * 1000, width=60)) <= 60
    assert curve([-1.0, 1.0]) == "▁█"


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress("run", stream) as progress:
        progress.phase("training")
        progress.count(1, 2)
        progress.step(1, 2, METRICS)
    lines = [line.partition("] ")[2] for line in stream.getvalue().splitlines()]
    assert lines == ["training", step_line(1, 2, METRICS)]


def test_a_terminal_shows_phase_bar_and_curve() -> None:
    stream = Terminal()
    with Progress("my-run", stream) as progress:
        progress.phase("training")
        progress.step(1, 2, METRICS)
        progress.say("store was killed by SIGKILL; starting it again")
    shown = stream.getvalue()
    for part in ("my-run", "training", "reward ▅ 0.500", "store was killed by SIGKILL"):
        assert part in shown


def test_each_of_several_models_has_its_line_and_its_curve(tmp_path: Path) -> None:
    stream = Terminal()
    with Progress("my-run", stream) as progress:
        progress.step(1, 2, METRICS, "planner")
        progress.step(1, 2, {**METRICS, "reward/mean": 0.0}, "solver")
    shown = stream.getvalue()
    for part in (
        "planner: reward ▅",
        "solver: reward ▁",
        "planner: step 1/2",
        "solver: step 1/2",
    ):
        assert part in shown
    histories = {
        name: [StepMetrics(step=n, metrics={"reward/mean": reward}) for n in (1, 2)]
        for name, reward in (("planner", 0.25), ("solver", 0.75))
    }
    pictures = [tmp_path / "one.png", tmp_path / "both.png"]
    draw_rewards(pictures[0], {"planner": histories["planner"]}, {}, "run")
    draw_rewards(pictures[1], histories, {}, "run")
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_an_algorithm_without_rewards_is_shown_by_its_own_numbers(tmp_path: Path) -> None:
    metrics = {"loss": 0.25, "alarm/length_runaway": 0.0, "time/step": 1.0, "tokens/trained": 7.0}
    assert step_line(2, None, metrics) == "step 2  loss 0.25  tokens 7  1.00 s"
    stream = Terminal()
    with Progress("my-run", stream) as progress:
        progress.step(2, 4, metrics)
    assert "loss 0.25" in stream.getvalue()
    picture = tmp_path / "metrics.png"
    draw_metrics(picture, [StepMetrics(step=1, metrics={"time/step": 1.0, "reward/mean": 1.0})], "run")
    assert not picture.exists()
    draw_metrics(picture, [StepMetrics(step=n, metrics=metrics) for n in (1, 2)], "run")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_reward_curve_is_a_picture(tmp_path: Path) -> None:
    history = [StepMetrics(step=n, metrics={"reward/mean": n / 5, "reward/std": 0.1}) for n in range(1, 6)]
    picture = tmp_path / "reward.png"
    draw_rewards(picture, {"": history}, {0: {"sampled": 0.2}, 5: {"sampled": 0.9}}, "run")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_validation_scores_stand_in_the_line_of_their_step() -> None:
    metrics = with_summary({**METRICS, "val-core/default/reward/mean@1": 0.75})
    assert step_line(3, 40, metrics).endswith("(rollout 1.50, update 0.75)  validation default 0.750")
    assert learner_line(3, 40, metrics).endswith("validation: default 0.750")

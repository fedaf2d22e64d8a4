"""Each alarm is provoked by bending a recorded healthy run, which by itself raises none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from agl_grpc.diagnosis import ALARMS_FILE, RULES, AlarmEvent, AlarmFile, AlarmLimits, AlarmWatch

Steps = list[dict[str, float]]
RECORDED = Path(__file__).parent / "recorded_tiny.jsonl"


def recorded() -> Steps:
    """Metrics of 16 steps of the tiny model with verl (tests/diagnosis/recorded.py made them)."""
    return [orjson.loads(line) for line in RECORDED.read_bytes().splitlines()]


def follow(steps: Steps, limits: AlarmLimits | None = None) -> list[AlarmEvent]:
    watch = AlarmWatch(limits)
    return [event for step in steps for event in watch.step(int(step["step"]), step)]


def bent(**changes: Callable[[int], float]) -> Steps:
    """The recorded run with some metrics made up from the step number; `__` stands for a slash."""
    made = recorded()
    for step in made:
        for name, value in changes.items():
            step[name.replace("__", "/")] = value(int(step["step"]))
    return made


PROVOKED: dict[str, Steps] = {
    "reward_hacking": bent(validation__maths=lambda step: 0.6 - 0.03 * step),
    "entropy_collapse": bent(loss__entropy=lambda step: 4.0 if step < 9 else 0.05),
    "length_runaway": bent(response_length__mean=lambda step: 10.0 * step),
    "dead_groups": bent(reward__groups_without_variance=lambda step: 0.9),
    "sampler_disagrees": bent(kl__sampler_trainer_k3=lambda step: 0.2 if step == 5 else 1e-6),
    "skipped_updates": bent(loss__skipped_updates=lambda step: 1.0 if step in (4, 5) else 0.0),
    "engine_starved": bent(idle__engine_seconds=lambda step: 9.6, time__step=lambda step: 10.0),
    "optimiser_starved": bent(idle__optimiser_seconds=lambda step: 9.7, time__step=lambda step: 10.0),
}


def test_a_healthy_run_raises_nothing() -> None:
    assert follow(recorded()) == []


def test_every_alarm_is_provoked_here() -> None:
    assert set(PROVOKED) == set(RULES)


@pytest.mark.parametrize("name", PROVOKED)
def test_an_alarm_is_said_once_with_numbers_and_what_to_do(name: str) -> None:
    raised = [event for event in follow(PROVOKED[name]) if event.raised]
    assert [event.name for event in raised] == [name]
    assert any(character.isdigit() for character in raised[0].seen)
    assert raised[0].advice
    assert raised[0].line.startswith(f"ALARM {name} at step ")


def test_truncation_is_length_runaway_too() -> None:
    events = follow(bent(answers__truncated=lambda step: 0.9))
    assert [event.name for event in events] == ["length_runaway"]
    assert "90%" in events[0].seen


def test_a_held_out_grader_that_falls_is_reward_hacking() -> None:
    steps = bent(grader__judge__kind__mean=lambda step: 1.0 - 0.03 * step)
    assert follow(steps) == []
    found = follow(steps, AlarmLimits(held_out=("grader/judge/kind/mean",)))
    assert [event.name for event in found] == ["reward_hacking"]


def test_an_alarm_is_over_once_after_three_good_steps() -> None:
    events = follow(PROVOKED["skipped_updates"])
    assert [(event.step, event.raised) for event in events] == [(4, True), (8, False)]
    assert "raised at step 4" in events[1].line


def test_a_value_that_hops_around_its_limit_is_said_once() -> None:
    hopping = bent(kl__sampler_trainer_k3=lambda step: 0.2 if step % 2 else 1e-6)
    assert [event.raised for event in follow(hopping)] == [True]


def test_the_state_is_a_metric_and_can_stop_the_run() -> None:
    watch = AlarmWatch(AlarmLimits(stop_on=("dead_groups",)))
    states = []
    for step in PROVOKED["dead_groups"]:
        watch.step(int(step["step"]), step)
        states.append((watch.numbers()["alarm/dead_groups"], watch.stops))
    assert states[4:6] == [(0.0, ""), (1.0, "dead_groups")]
    assert set(watch.numbers()) == {f"alarm/{name}" for name in RULES}


def test_numbers_that_are_not_finite_raise_nothing_by_themselves() -> None:
    assert follow(bent(reward__groups_without_variance=lambda step: float("nan"))) == []


def test_events_are_lines_of_the_run_folder(tmp_path: Path) -> None:
    file = AlarmFile(tmp_path)
    for event in follow(PROVOKED["skipped_updates"]):
        file.write(event)
    lines = [orjson.loads(line) for line in (tmp_path / ALARMS_FILE).read_bytes().splitlines()]
    assert [(line["name"], line["raised"]) for line in lines] == [
        ("skipped_updates", True),
        ("skipped_updates", False),
    ]


def test_limits_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="stop_on names no alarm 'boredom'"):
        AlarmLimits(stop_on=("boredom",))
    with pytest.raises(ValueError, match="window 0"):
        AlarmLimits(window=0)

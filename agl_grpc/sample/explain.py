"""What became of every token of an attempt's calls, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from agl_grpc.sample.build import DEFAULT_RULES, Reading, left_out, read_attempt
from agl_grpc.sample.calls import Answer
from agl_grpc.sample.trajectory import Trajectory
from agl_grpc.sample.types import AttemptRecord, DropReason, SampleRules


class Fate(StrEnum):
    """What became of a token."""

    TRAINED = "trained"
    OBSERVATION = "observation"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens with one fate. Places count from the first token of the call's prompt; end is one past the last.

    reason is a word (a `DropReason`, or `sampled`, `prompt`, `between_turns`), a colon and a sentence.
    """

    start: int
    end: int
    fate: Fate
    reason: str


@dataclass(frozen=True, slots=True)
class AnswerFate:
    """The fate of one answer's tokens: stretches in order, without gaps, over prompt and response."""

    span_id: bytes
    choice: int
    prompt_length: int
    stretches: Sequence[Stretch]


def explain_attempt(record: AttemptRecord, rules: SampleRules = DEFAULT_RULES) -> list[AnswerFate]:
    """The fate of all tokens of a sealed attempt, answer by answer in call order.

    The stretches add up to the attempt's token account. Raises SampleError for data that cannot be right.
    """
    reading = read_attempt(record, rules)
    places = _places(reading)
    return [
        AnswerFate(
            answer.span_id,
            answer.index,
            answer.prompt_length,
            [
                stretch
                for stretch in _stretches(answer, places, reading, rules)
                if stretch.end > stretch.start
            ],
        )
        for answer in reading.answers
    ]


def _places(reading: Reading) -> dict[int, tuple[int, Trajectory, int]]:
    """Row, trajectory and turn of every answer that is in a row."""
    return {
        answer.place: (row, trajectory, turn)
        for row, trajectory in enumerate(reading.kept)
        for turn, answer in enumerate(trajectory.answers)
    }


def _stretches(
    answer: Answer,
    places: dict[int, tuple[int, Trajectory, int]],
    reading: Reading,
    rules: SampleRules,
) -> list[Stretch]:
    if answer.place not in places:
        return [_dropped(0, answer.length, _why(answer, reading))]
    row, trajectory, turn = places[answer.place]
    prompt, end = answer.prompt_length, answer.length
    if turn:
        before = trajectory.answers[turn - 1]
        repeated = (
            f"{DropReason.MERGED_PREFIX}: they repeat turn {turn - 1} of row {row}, where they count once"
        )
        between = f"between_turns: observed between turns {turn - 1} and {turn} of row {row}, not sampled"
        stretches = [
            Stretch(0, before.length, Fate.DROPPED, repeated),
            Stretch(before.length, prompt, Fate.OBSERVATION, between),
        ]
    else:
        begins = f"prompt: the prompt with which row {row} begins ({trajectory.start.value}), not sampled"
        stretches = [Stretch(0, prompt, Fate.OBSERVATION, begins)]
    if left_out(answer, rules):
        return [*stretches, _dropped(prompt, end, DropReason.LENGTH)]
    versions = sorted(set(answer.versions.tolist()))
    under = ", ".join(map(str, versions))
    said = f"sampled: turn {turn} of row {row}, by policy version {under}"
    return [*stretches, Stretch(prompt, end, Fate.TRAINED, said)]


def _why(answer: Answer, reading: Reading) -> DropReason:
    if reading.refusal is not None:
        return reading.refusal
    excluded = {other.place: reason for other, reason in reading.merge.excluded}
    return excluded.get(answer.place, DropReason.OVER_LONG)


def _dropped(start: int, end: int, reason: DropReason) -> Stretch:
    return Stretch(start, end, Fate.DROPPED, f"{reason}: {reason.sentence}")

"""From when on an alarm is raised."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class AlarmLimits:
    """Limits of all alarms; defaults stand in docs/metrics.md.

    window: steps that a mean is made of. raise_after, clear_after: steps in a row after which an alarm is
    raised, and over. stop_on: alarms that end the run after the step, as a request to stop does.
    held_out: metrics that must not fall while the reward rises, besides all ``validation/…``.
    reward_rise, held_out_fall: the least changes that count as such, in the reward's own unit.
    entropy_floor (nats a token) and entropy_share (of the first window's mean): below either, entropy has
    collapsed. length_factor: times the first window's mean response length. truncated_share: of answers.
    dead_share: of groups. kl: between sampler and trainer, in nats a token. idle_share: of a step's time;
    idle_seconds: shorter waits are none.
    """

    window: int = 5
    raise_after: int = 2
    clear_after: int = 3
    stop_on: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    reward_rise: float = 0.05
    held_out_fall: float = 0.05
    entropy_floor: float = 0.01
    entropy_share: float = 0.1
    length_factor: float = 2.0
    truncated_share: float = 0.5
    dead_share: float = 0.8
    kl: float = 0.01
    idle_share: float = 0.9
    idle_seconds: float = 1.0

    def __post_init__(self) -> None:
        from agl_grpc.diagnosis.rules import RULES

        for name in ("window", "raise_after", "clear_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not value >= 0:
                raise ValueError(f"{field.name} {value} must be 0 or more")
        for name in self.stop_on:
            if name not in RULES:
                raise ValueError(f"stop_on names no alarm {name!r}; there are {', '.join(RULES)}")

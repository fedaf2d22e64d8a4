"""What a run's numbers say about it: alarms, where metrics go, samples of what is trained. No torch."""

from __future__ import annotations

from agl_grpc.diagnosis.limits import AlarmLimits
from agl_grpc.diagnosis.rules import RULES, Finding
from agl_grpc.diagnosis.watch import ALARMS_FILE, AlarmEvent, AlarmFile, AlarmWatch

__all__ = [
    "ALARMS_FILE",
    "RULES",
    "AlarmEvent",
    "AlarmFile",
    "AlarmLimits",
    "AlarmWatch",
    "Finding",
]

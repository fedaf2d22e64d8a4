"""Entries of the event log."""

from __future__ import annotations

from typing import NamedTuple


class EventRow(NamedTuple):
    """An entry of the event log.

    Attributes:
        run_key: The run.
        entity: What it is about, an EntityKind.
        kind: What happened, an EventKind.
        ref: Integer key of the entity; for SPANS the attempt's.
        low: For SPANS the first new row's key, else 0.
        high: For SPANS the last new row's key, else 0.
        time: Microseconds since the epoch.
        entity_id: The text id, for DELETED only (its row is gone).
    """

    run_key: int
    entity: int
    kind: int
    ref: int
    low: int
    high: int
    time: int
    entity_id: str | None

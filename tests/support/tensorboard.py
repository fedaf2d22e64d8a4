"""Reads TensorBoard's event files."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2

_HEAD = struct.Struct("<QI")
_CHECKSUM_BYTES = 4


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a folder's event files: its value by step."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            length, _ = _HEAD.unpack_from(data, place)
            place += _HEAD.size
            event = event_pb2.Event.FromString(data[place : place + length])
            place += length + _CHECKSUM_BYTES
            for each in event.summary.value:
                found.setdefault(each.tag, {})[event.step] = each.simple_value
    return found

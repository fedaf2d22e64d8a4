"""A mark for arguments that were not given, where ``None`` means something."""

from __future__ import annotations

from enum import Enum


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "unset"

    def __bool__(self) -> bool:
        return False


UNSET = Unset.UNSET

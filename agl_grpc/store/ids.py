"""Minted ids: a prefix, the time, and randomness.

The time comes first so that new ids land at the end of their text index instead of all over it.
"""

from __future__ import annotations

import os
import re
import time

_CALLER_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def mint(prefix: str) -> str:
    """A new id such as `ro-0199f3a2c41b5e…`: 11 hex digits of milliseconds, 14 of randomness."""
    return f"{prefix}-{time.time_ns() // 1_000_000:011x}{os.urandom(7).hex()}"


def is_valid_id(text: str) -> bool:
    """Whether a caller may use this as an id: 1 to 128 bytes of `[A-Za-z0-9._:-]`."""
    return _CALLER_ID.fullmatch(text) is not None

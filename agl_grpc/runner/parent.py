"""What becomes of a child process when its parent is gone."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have this process sent a signal when the thread that started it ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)

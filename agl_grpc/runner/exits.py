"""How processes ended, in words."""

from __future__ import annotations

import signal


def describe_exit(code: int | None) -> str:
    """For example `exited with code 1` or `was killed by SIGKILL`; None = it still runs."""
    if code is None:
        return "still runs"
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal_name(-code)}"


def signal_name(number: int) -> str:
    """For example `SIGKILL`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

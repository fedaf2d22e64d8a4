"""The event log read: watches, waits and timers."""

from __future__ import annotations

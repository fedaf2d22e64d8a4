"""Checks of a whole database: every invariant by name, and the rows that break it."""

from __future__ import annotations

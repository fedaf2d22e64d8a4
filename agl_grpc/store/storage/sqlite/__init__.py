"""SQLite: one file, one server."""

from __future__ import annotations

"""The SQLite file: schema, the single writer and its transactions, reads."""

from __future__ import annotations

"""Spans and model calls: checked, queued, written, streamed, read."""

from __future__ import annotations

"""Agents of real frameworks, run by real workers on a real engine."""

from __future__ import annotations

"""Trainer: components, processes, validation, runs with algorithms of this process."""

from __future__ import annotations

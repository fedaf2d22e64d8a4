"""Rollouts, attempts, leases and workers: the rules of their life and how they are applied."""

from __future__ import annotations

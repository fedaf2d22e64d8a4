"""Two agents that work together, each trained as an adapter of its own on one base model."""

from __future__ import annotations

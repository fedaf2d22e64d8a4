"""The whole loop: real agent, store, workers, vLLM and verl."""

from __future__ import annotations

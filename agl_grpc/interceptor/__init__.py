"""Token-exact capture of model calls inside vLLM, and weight swaps driven by the store."""

from __future__ import annotations

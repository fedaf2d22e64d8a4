"""APO: prompts are improved by criticism in words, with a beam of the best ones."""

from __future__ import annotations

from agl_grpc.algorithm.apo.apo import APO

__all__ = ["APO"]

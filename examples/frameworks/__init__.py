"""One small agent for each framework; see README.md."""

from __future__ import annotations

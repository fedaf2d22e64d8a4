"""Workers, their processes and their agents."""

from __future__ import annotations

"""What the algorithms that improve prompts share."""

from __future__ import annotations

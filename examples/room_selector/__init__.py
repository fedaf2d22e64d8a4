"""APO on a small task: the prompt of an agent that books meeting rooms is improved."""

from __future__ import annotations

"""`Trainer`, the environments it starts engine and learner in, and the processes of a training run."""

from __future__ import annotations

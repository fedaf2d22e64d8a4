"""Train a small language model to use a calculator: the whole loop on one machine."""

from __future__ import annotations

"""Performance, measured: `make bench` runs each `bench_*.py` several times and writes the medians down."""

from __future__ import annotations

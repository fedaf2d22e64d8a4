"""What several suites share: waiting without sleeping blindly, free ports, a real store process."""

from __future__ import annotations

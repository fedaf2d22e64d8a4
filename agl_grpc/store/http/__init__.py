"""The HTTP door: REST for clients of Agent Lightning, OTLP, the legacy routes."""

from __future__ import annotations

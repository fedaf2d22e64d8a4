"""OpenTelemetry's protocol: spans of any SDK become spans of attempts."""

from __future__ import annotations

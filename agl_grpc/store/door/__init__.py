"""The gRPC door: server, services, callers, credentials."""

from __future__ import annotations

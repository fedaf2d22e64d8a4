"""Tests of the doors for existing users: REST, OTLP, legacy routes, AgentOps."""

from __future__ import annotations

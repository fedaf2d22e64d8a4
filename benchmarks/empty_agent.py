"""Agents that do nothing: what is measured with them is everything around an agent."""

from __future__ import annotations

from typing import Any

from agl_grpc.agent import LitAgent


class EmptyAgent(LitAgent[Any]):
    """Ends at once, on the event loop."""

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> None:
        """Nothing."""


class EmptySyncAgent(LitAgent[Any]):
    """Ends at once, in a thread."""

    def rollout(self, task: Any, resources: Any, rollout: Any) -> None:
        """Nothing."""

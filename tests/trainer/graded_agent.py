"""An agent that says what its task tells it to, and gives itself no reward."""

from __future__ import annotations

from typing import Any

import agl_grpc


@agl_grpc.rollout
def says(task: dict[str, Any], resources: agl_grpc.NamedResources) -> None:
    """Emits its answer."""
    agl_grpc.emit_message(task["say"])

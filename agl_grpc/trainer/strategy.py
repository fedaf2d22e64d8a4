"""Where algorithm and workers run."""

from __future__ import annotations

from typing import Literal

from agl_grpc.trainer.errors import TrainerError

Role = Literal["algorithm", "runner", "both"]


class ExecutionStrategy:
    """Base of strategies: which of the two sides run here."""

    runs_algorithm = True
    runs_workers = True


class ClientServerExecutionStrategy(ExecutionStrategy):
    """Workers are processes; over several machines each side is started with its role.

    Args:
        role: ``both`` here, or only the ``algorithm`` (with store and engine), or only a ``runner``'s workers
            for a store that runs elsewhere.
        server_host: the store's host, for the role ``runner``.
        server_port: the store's port; None = any free one, or 4747 for the role ``runner``.
    """

    def __init__(
        self, role: Role = "both", *, server_host: str = "127.0.0.1", server_port: int | None = None
    ) -> None:
        if role not in ("algorithm", "runner", "both"):
            raise TrainerError(f"role {role!r} is none of algorithm, runner, both")
        self.role = role
        self.server_host = server_host
        self.server_port = server_port
        self.runs_algorithm = role != "runner"
        self.runs_workers = role != "algorithm"


class SharedMemoryExecutionStrategy(ExecutionStrategy):
    """Workers are threads of this process: agents can be stepped through with a debugger."""


STRATEGIES: dict[str, type[ExecutionStrategy]] = {
    "cs": ClientServerExecutionStrategy,
    "shm": SharedMemoryExecutionStrategy,
}

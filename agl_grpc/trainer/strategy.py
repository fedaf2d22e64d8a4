"""Where algorithm and workers run."""

from __future__ import annotations

import os
from typing import Any, Literal

from agl_grpc.trainer.errors import TrainerError

Role = Literal["algorithm", "runner", "both"]
StartMethod = Literal["spawn", "fork"]

ROLE = "AGL_CURRENT_ROLE"
SERVER_HOST = "AGL_SERVER_HOST"
SERVER_PORT = "AGL_SERVER_PORT"
MANAGED_STORE = "AGL_MANAGED_STORE"

DEFAULT_PORT = 4747
_ROLES: tuple[Role, ...] = ("algorithm", "runner", "both")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_ANY_ADDRESS = ("0.0.0.0", "::")


class ExecutionStrategy:
    """Base of strategies: which of the two sides run here.

    Args:
        n_runners: workers; None = as many as the trainer says.
        graceful_timeout: seconds that agents have to finish when everything stops; None = as the trainer's
            ``runner`` says.
    """

    runs_algorithm = True
    runs_workers = True

    def __init__(self, *, n_runners: int | None = None, graceful_timeout: float | None = None) -> None:
        if n_runners is not None and n_runners < 1:
            raise TrainerError(f"n_runners is {n_runners}; it must be 1 or more")
        if graceful_timeout is not None and graceful_timeout < 0:
            raise TrainerError(f"graceful_timeout is {graceful_timeout}; it must be 0 or more")
        self.n_runners = n_runners
        self.graceful_timeout = graceful_timeout


class ClientServerExecutionStrategy(ExecutionStrategy):
    """Workers are processes; over several machines each side is started with its role.

    What is not given here is read from the environment, so that one program serves as every role.

    Args:
        role: ``both`` here, or only the ``algorithm`` (with store and engine), or only a ``runner``'s workers
            for a store that runs elsewhere; None = ``AGL_CURRENT_ROLE``, else ``both``.
        server_host: the store's host for the role ``runner``, and the address that a store started here
            listens on; None = ``AGL_SERVER_HOST``, else 127.0.0.1.
        server_port: the store's port; None = ``AGL_SERVER_PORT``, else any free one where both sides run
            here, and 4747 where they do not.
        n_runners: worker processes; None = as many as the trainer says.
        graceful_timeout: seconds that agents have to finish when everything stops.
        managed_store: whether a store is started for the algorithm; False = one runs at that host and port
            already; None = ``AGL_MANAGED_STORE``, else True.
        start_method: ``spawn``: the agent is imported or unpickled in fresh processes; ``fork``: workers are
            copies of this program, so that the agent may be anything. For ``fork`` use no gRPC before `fit`.

    Raises:
        TrainerError: an argument, or a variable of the environment, is none of what it may be.
    """

    def __init__(
        self,
        role: Role | None = None,
        *,
        server_host: str | None = None,
        server_port: int | None = None,
        n_runners: int | None = None,
        graceful_timeout: float | None = None,
        managed_store: bool | None = None,
        start_method: StartMethod = "spawn",
    ) -> None:
        super().__init__(n_runners=n_runners, graceful_timeout=graceful_timeout)
        self.role = _role(role)
        self.server_host: str = server_host or os.environ.get(SERVER_HOST, "") or "127.0.0.1"
        self.server_port = _port(server_port)
        self.managed_store = _managed(managed_store)
        if start_method not in ("spawn", "fork"):
            raise TrainerError(f"start_method {start_method!r} is none of spawn, fork")
        self.start_method = start_method
        self.runs_algorithm = self.role != "runner"
        self.runs_workers = self.role != "algorithm"

    @property
    def store_port(self) -> int:
        """The port of a store that is started here; 0 = any free one."""
        return self.server_port or (0 if self.role == "both" else DEFAULT_PORT)

    @property
    def existing_store(self) -> str:
        """The address of the store that runs already; empty = one is started."""
        if self.managed_store and self.runs_algorithm:
            return ""
        return f"{reachable(self.server_host)}:{self.server_port or DEFAULT_PORT}"


class SharedMemoryExecutionStrategy(ExecutionStrategy):
    """Workers are threads of this process: agents can be stepped through with a debugger."""


STRATEGIES: dict[str, type[ExecutionStrategy]] = {
    "cs": ClientServerExecutionStrategy,
    "shm": SharedMemoryExecutionStrategy,
}


def reachable(host: str) -> str:
    """Where a client on this machine finds what listens on ``host``."""
    return "127.0.0.1" if host in _ANY_ADDRESS else host


def _role(given: Any) -> Role:
    role = given or os.environ.get(ROLE, "") or "both"
    for known in _ROLES:
        if role == known:
            return known
    raise TrainerError(f"{_source(given, 'role', ROLE)} {role!r} is none of {', '.join(_ROLES)}")


def _port(given: int | None) -> int | None:
    text = os.environ.get(SERVER_PORT, "") if given is None else str(given)
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise TrainerError(f"{_source(given, 'server_port', SERVER_PORT)} {text!r} is no port: 1 to 65535")
    return int(text)


def _managed(given: bool | None) -> bool:
    text = os.environ.get(MANAGED_STORE, "").lower() if given is None else str(given).lower()
    if text and text not in (*_TRUE, *_FALSE):
        raise TrainerError(f"{MANAGED_STORE} {text!r} is none of {', '.join((*_TRUE, *_FALSE))}")
    return text not in _FALSE


def _source(given: object, argument: str, variable: str) -> str:
    return variable if given is None else argument

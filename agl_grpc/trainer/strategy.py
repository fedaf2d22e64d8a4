"""Where algorithm and workers run."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
        managed_store: whether a store is started here; False = the trainer is given one; None = as is needed.
    """

    runs_algorithm = True
    runs_workers = True

    def __init__(
        self,
        *,
        n_runners: int | None = None,
        graceful_timeout: float | None = None,
        managed_store: bool | None = None,
    ) -> None:
        if n_runners is not None and n_runners < 1:
            raise TrainerError(f"n_runners is {n_runners}; it must be 1 or more")
        _seconds("graceful_timeout", graceful_timeout)
        self.n_runners = n_runners
        self.graceful_timeout = graceful_timeout
        self.managed_store = managed_store


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
        terminate_timeout: seconds after which a process that was told to end is killed; what agents have to
            finish is added.
        main_process: ``algorithm`` only: see Raises.
        allowed_exit_codes: codes with which a worker process has left and is not restarted, negative for
            signals; others are crashes. Its rollouts are delivered again all the same.
        managed_store: whether a store is started for the algorithm; False = one runs at that host and port
            already; None = ``AGL_MANAGED_STORE``, else True.
        start_method: ``spawn``: the agent is imported or unpickled in fresh processes; ``fork``: workers are
            copies of this program, so that the agent may be anything. For ``fork`` use no gRPC before `fit`.

    Raises:
        TrainerError: an argument, or a variable of the environment, is none of what it may be.
            ``main_process="runner"``, with which 0.3 put its one worker into the main process for a
            debugger, is refused: strategy ``shm`` is for that.
    """

    def __init__(
        self,
        role: Role | None = None,
        *,
        server_host: str | None = None,
        server_port: int | None = None,
        n_runners: int | None = None,
        graceful_timeout: float | None = None,
        terminate_timeout: float = 20.0,
        main_process: Literal["algorithm", "runner"] = "algorithm",
        managed_store: bool | None = None,
        allowed_exit_codes: Sequence[int] = (0,),
        start_method: StartMethod = "spawn",
    ) -> None:
        super().__init__(
            n_runners=n_runners, graceful_timeout=graceful_timeout, managed_store=_managed(managed_store)
        )
        _main(
            "main_process", main_process, "workers are processes here; to debug an agent use strategy='shm'"
        )
        self.terminate_timeout = _seconds("terminate_timeout", terminate_timeout) or 0.0
        self.allowed_exit_codes = _codes(allowed_exit_codes)
        self.role = _role(role)
        self.server_host: str = server_host or os.environ.get(SERVER_HOST, "") or "127.0.0.1"
        self.server_port = _port(server_port)
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
    """Workers are threads of this process: agents can be stepped through with a debugger.

    An asynchronous algorithm runs in the main thread; what blocks, of algorithm and agents, in threads of its
    own, so that one that hangs can be left behind.

    Args:
        n_runners: threads; None = as many as the trainer says.
        main_thread: ``algorithm`` only: see Raises.
        join_timeout: seconds that a thread gets to deliver what it has done, after its agents' time.
        graceful_delay: seconds that agents have to finish when everything stops; None = as the trainer's
            ``runner`` says.
        poll_interval: accepted for older callers and not used: nothing polls.
        managed_store: whether a store is started here; False = the trainer is given one.

    Raises:
        TrainerError: an argument is none of what it may be. ``main_thread="runner"`` is refused: an agent
            in the main thread could be neither timed out nor cancelled; breakpoints work in its own too.
    """

    def __init__(
        self,
        n_runners: int | None = None,
        main_thread: Literal["algorithm", "runner"] = "algorithm",
        *,
        join_timeout: float = 15.0,
        graceful_delay: float | None = None,
        poll_interval: object = None,
        managed_store: bool | None = None,
    ) -> None:
        _seconds("graceful_delay", graceful_delay)
        super().__init__(n_runners=n_runners, graceful_timeout=graceful_delay, managed_store=managed_store)
        reason = (
            "an agent in the main thread could be neither timed out nor cancelled; "
            "breakpoints work in its own thread too"
        )
        _main("main_thread", main_thread, reason)
        self.join_timeout = _seconds("join_timeout", join_timeout) or 0.0


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


def _seconds(name: str, value: float | None) -> float | None:
    if value is not None and not 0 <= value < float("inf"):
        raise TrainerError(f"{name} is {value}; it must be 0 or more seconds")
    return value


def _main(name: str, value: str, reason: str) -> None:
    if value not in ("algorithm", "runner"):
        raise TrainerError(f"{name} {value!r} is none of algorithm, runner")
    if value == "runner":
        raise TrainerError(f"{name}='runner' is not supported: {reason}")


def _codes(given: Sequence[int]) -> tuple[int, ...]:
    codes = tuple(given)
    for code in codes:
        if isinstance(code, bool) or not isinstance(code, int) or not -64 <= code <= 255:
            raise TrainerError(f"allowed_exit_codes holds {code!r}, which is no exit code: -64 to 255")
    return codes


def _source(given: object, argument: str, variable: str) -> str:
    return variable if given is None else argument

"""What the interceptor is told: inside an engine through environment variables, which reach every process
that vLLM starts.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

PREFIX = "AGL_INTERCEPTOR_"

UNATTRIBUTED = ("serve", "record", "refuse")
"""What may become of calls that name no attempt."""

ON_SWAP = ("wait", "refuse")
"""What may become of new calls while weights are loaded."""

RUNNING_ON_SWAP = ("keep", "finish", "cut")
"""What may become of running calls of attempts when new weights come."""

FAILURE_FILE = "AGL_INTERCEPTOR_FAILURE_FILE"
"""Variable by which `serve` says where the reason of a stop is to be left; set in its processes only."""

_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    float | None: float,
    bool: lambda text: text == "True",
}
"""How a setting of each type is read from its variable."""


@dataclass(frozen=True)
class CaptureSettings:
    """What an engine and a proxy are told alike, with the defaults of both.

    Times are in seconds; a limit of 0 is no limit.

    Attributes:
        store: ``host:port`` of the store's gRPC door.
        run_id: the run that the engine serves, or whose policy versions count for the proxy.
        policy_version: the version of the weights on disk; before engines, where the store knows none.
        spool_dir: where calls lie until the store has them; empty: under the user's state folder.
        spool_bytes: how much may lie there.
        ack_timeout: how long the store may take to answer before it counts as away.
        temperature: imposed on training calls; None: the resource's, else the agent's.
        unattributed: what becomes of calls that name no attempt: ``serve`` them, ``record`` them too, as
            rollouts of the run `external_run`, or ``refuse`` them.
        external_run: the run of recorded calls that name no attempt.
        keep_raw: keep requests and answers as they came and went.
        max_calls, max_tokens, max_concurrency: limits of one rollout; tokens are those of prompts and
            answers of calls that have ended.
        max_body: most bytes of a request.
    """

    store: str
    run_id: str = "default"
    policy_version: int = 0
    spool_dir: str = ""
    spool_bytes: int = 10 * 1000**3
    ack_timeout: float = 1.0
    temperature: float | None = None
    unattributed: str = "serve"
    external_run: str = "external"
    keep_raw: bool = True
    max_calls: int = 0
    max_tokens: int = 0
    max_concurrency: int = 0
    max_body: int = 64 * 1024 * 1024

    def spool_under(self, name: str) -> Path:
        """Folder of the spool: as told, else the one of this name under the user's state folder."""
        if self.spool_dir:
            return Path(self.spool_dir)
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return state / "agl-grpc" / "spool" / name


@dataclass(frozen=True)
class Settings(CaptureSettings):
    """Settings of one engine, besides `CaptureSettings`.

    `engine_id` is its name in the run; `endpoint` the base URL told to the store (empty: from vLLM's host,
    port); `resume_timeout` how long (seconds) answers wait for an engine that aborted them itself;
    `keep_weights` whether the weights that serve are also kept beside the spool, for a restart; `loader` how
    vLLM is entered: ``auto``, or ``class`` also where it has endpoint plugins; `on_swap` what becomes of new
    calls while weights are loaded: they ``wait``, or are refused with 429 (``refuse``); `running_on_swap`
    what becomes of calls of attempts that run then: they go on under the new weights (``keep``), run to their
    end under the old ones (``finish``: those that do not within `swap_timeout` seconds make the swap fail),
    or are ``cut`` if they still run after `swap_timeout` seconds; `adapters` (names with commas between them)
    are the adapters that take new weights, each for itself, in the model's place.
    """

    engine_id: str = ""
    endpoint: str = ""
    resume_timeout: float = 600.0
    keep_weights: bool = True
    loader: str = "auto"
    on_swap: str = "wait"
    running_on_swap: str = "keep"
    swap_timeout: float = 60.0
    adapters: str = ""

    def environment(self) -> dict[str, str]:
        """As environment variables, for `from_environment` in another process."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {PREFIX + name.upper(): str(value) for name, value in pairs if value is not None}

    @staticmethod
    def from_environment(environ: Mapping[str, str] | None = None) -> Settings | None:
        """Settings as set by `environment`; None where no store is named: the interceptor is then off.

        Raises ValueError for a number that is none.
        """
        source = os.environ if environ is None else environ
        kinds = get_type_hints(Settings)
        given = {
            field.name: _PARSERS[kinds[field.name]](source[PREFIX + field.name.upper()])
            for field in fields(Settings)
            if source.get(PREFIX + field.name.upper())
        }
        if "store" not in given:
            return None
        settings = Settings(**given)
        return settings if settings.engine_id else replace(settings, engine_id=default_engine_id())

    def spool_path(self) -> Path:
        """Folder of the spool."""
        return self.spool_under(self.engine_id.replace("/", "_").replace(":", "_"))

    def kept_weights_path(self) -> Path | None:
        """Folder of the weights that serve; None when they are not to be kept."""
        return self.spool_path() / "weights" if self.keep_weights else None


def default_engine_id() -> str:
    """Host name and process id: unique among engines that live at one time."""
    return f"{socket.gethostname()}-{os.getpid()}"

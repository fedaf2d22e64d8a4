"""What the interceptor is told, through environment variables: they reach every process that vLLM starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

PREFIX = "AGL_INTERCEPTOR_"

UNATTRIBUTED = ("serve", "record", "refuse")
"""What may become of calls that name no attempt."""

ON_SWAP = ("wait", "refuse")
"""What may become of new calls while weights are loaded."""

RUNNING_ON_SWAP = ("keep", "finish", "cut")
"""What may become of running calls of attempts when new weights come."""

DEFAULT_SPOOL_BYTES = 10 * 1000**3

FAILURE_FILE = "AGL_INTERCEPTOR_FAILURE_FILE"
"""Variable by which `serve` says where the reason of a stop is to be left; set in its processes only."""


@dataclass(frozen=True)
class Settings:
    """Settings of one engine.

    `store` is ``host:port`` of the store's gRPC door; `run_id` the run that the engine serves; `engine_id`
    its name in that run; `policy_version` the version of the weights on disk; `spool_dir` where calls wait
    while the store is away, `spool_bytes` how much may wait there; `ack_timeout` how long (seconds) an
    answer's last byte waits for the store before the spool takes over; `temperature` overrides the agents'
    own temperature in train mode (None: theirs); `endpoint` is the base URL told to the store (empty: from
    vLLM's host, port); `resume_timeout` how long (seconds) answers wait for an engine that aborted them
    itself; `keep_weights` whether the weights that serve are also kept beside the spool, for a restart;
    `loader` how vLLM is entered: ``auto``, or ``class`` also where it has endpoint plugins; `unattributed`
    what becomes of calls that name no attempt: ``serve`` them, ``record`` them too, as rollouts of the run
    `external_run`, or ``refuse`` them; `keep_raw` whether requests and answers are kept as they came and
    went; `on_swap` what becomes of new calls while weights are loaded: they ``wait``, or are refused with 429
    (``refuse``); `running_on_swap` what becomes of calls of attempts that run then: they go on under the new
    weights (``keep``), run to their end under the old ones (``finish``: those that do not within
    `swap_timeout` seconds make the swap fail), or are ``cut`` if they still run after `swap_timeout` seconds;
    `max_calls`, `max_tokens` and `max_concurrency` are limits of one rollout (tokens: prompts and answers of
    calls that have ended; 0: no limit), `max_body` the most bytes of one of its requests; `adapters` (names
    with commas between them) are the adapters that take new weights, each for itself, in the model's place.
    """

    store: str
    run_id: str = "default"
    engine_id: str = ""
    policy_version: int = 0
    spool_dir: str = ""
    spool_bytes: int = DEFAULT_SPOOL_BYTES
    ack_timeout: float = 1.0
    temperature: float | None = None
    endpoint: str = ""
    resume_timeout: float = 600.0
    keep_weights: bool = True
    loader: str = "auto"
    unattributed: str = "serve"
    external_run: str = "external"
    keep_raw: bool = True
    on_swap: str = "wait"
    running_on_swap: str = "keep"
    swap_timeout: float = 60.0
    max_calls: int = 0
    max_tokens: int = 0
    max_concurrency: int = 0
    max_body: int = 64 * 1024 * 1024
    adapters: str = ""

    def environment(self) -> dict[str, str]:
        """As environment variables, for `from_environment` in another process."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {PREFIX + name.upper(): str(value) for name, value in pairs if value is not None}

    @staticmethod
    def from_environment(environ: Mapping[str, str] | None = None) -> Settings | None:
        """Settings as set by `environment`; None where no store is named: the interceptor is then off."""
        source = os.environ if environ is None else environ
        given = {
            field.name: source[PREFIX + field.name.upper()]
            for field in fields(Settings)
            if source.get(PREFIX + field.name.upper())
        }
        if "store" not in given:
            return None
        return Settings(
            store=given["store"],
            run_id=given.get("run_id", "default"),
            engine_id=given.get("engine_id", "") or default_engine_id(),
            policy_version=int(given.get("policy_version", "0")),
            spool_dir=given.get("spool_dir", ""),
            spool_bytes=int(given.get("spool_bytes", str(DEFAULT_SPOOL_BYTES))),
            ack_timeout=float(given.get("ack_timeout", "1.0")),
            temperature=float(given["temperature"]) if "temperature" in given else None,
            endpoint=given.get("endpoint", ""),
            resume_timeout=float(given.get("resume_timeout", "600")),
            keep_weights=given.get("keep_weights", "True") == "True",
            loader=given.get("loader", "auto"),
            unattributed=given.get("unattributed", "serve"),
            external_run=given.get("external_run", "external"),
            keep_raw=given.get("keep_raw", "True") == "True",
            on_swap=given.get("on_swap", "wait"),
            running_on_swap=given.get("running_on_swap", "keep"),
            swap_timeout=float(given.get("swap_timeout", "60")),
            max_calls=int(given.get("max_calls", "0")),
            max_tokens=int(given.get("max_tokens", "0")),
            max_concurrency=int(given.get("max_concurrency", "0")),
            max_body=int(given.get("max_body", str(64 * 1024 * 1024))),
            adapters=given.get("adapters", ""),
        )

    def spool_path(self) -> Path:
        """Folder of the spool: as told, else one for this engine under the user's state folder."""
        if self.spool_dir:
            return Path(self.spool_dir)
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return state / "agl-grpc" / "spool" / self.engine_id.replace("/", "_").replace(":", "_")

    def kept_weights_path(self) -> Path | None:
        """Folder of the weights that serve; None when they are not to be kept."""
        return self.spool_path() / "weights" if self.keep_weights else None


def default_engine_id() -> str:
    """Host name and process id: unique among engines that live at one time."""
    return f"{socket.gethostname()}-{os.getpid()}"

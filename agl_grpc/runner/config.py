"""What a group of workers is told at its start."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ISOLATIONS = ("thread", "process", "command", "kubernetes")


def default_name() -> str:
    """Host name and process id: unique among the groups of workers of a cluster."""
    return f"{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerConfig:
    """Settings of a group of worker processes; picklable, so that it reaches spawned processes."""

    agent: Any = None
    """The agent: an import path `module:name`, or a picklable `LitAgent`; None with `command`."""
    store: str = "127.0.0.1:4747"
    """The store's gRPC address."""
    workers: int = 1
    """Worker processes."""
    concurrency: int = 1
    """Rollouts that one worker process executes at once."""
    run_id: str = "default"
    """The run whose rollouts are executed."""
    queues: Sequence[str] = ()
    """Queues that are served; empty = the run's own."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Only rollouts whose labels are all among these; empty = any."""
    name: str = field(default_factory=default_name)
    """Worker ids are this name with `-0`, `-1`, …"""
    lease_seconds: float = 30.0
    """How long a lease lasts without renewal; renewed at a third of it."""
    heartbeat_seconds: float = 10.0
    """Time between two heartbeats."""
    drain_seconds: float = 30.0
    """How long a draining worker lets its agents finish before it hands their rollouts back."""
    hooks: Sequence[Any] = ()
    """`Hook` objects, or import paths of them."""
    max_rollouts: int | None = None
    """Leave after so many rollouts of each worker; None = never."""
    app_dir: str | None = None
    """Folder put first on the import path of the workers, for `agent`; None = none."""
    log_level: str = "info"
    """Level of the workers' log on standard error."""

    isolation: str = "thread"
    """Where agents run: `thread` (in the worker), `process` (one of its own), `command`, `kubernetes`."""
    command: str = ""
    """For isolation `command`: the shell command that is the agent."""
    job_template: str = ""
    """For isolation `kubernetes`: file with the Job that each rollout becomes."""
    namespace: str | None = None
    """For isolation `kubernetes`; None = that of the cluster's configuration."""
    wait_for_resources: bool = False
    """Whether workers take nothing before the run has resources."""
    tracer: Any = None
    """Records agents' spans: a `Tracer`, its class, or an import path; None = an `OtelTracer`."""
    start_method: str = "spawn"
    """How worker processes start: `spawn`, or `fork` from a process that has never used gRPC."""
    allowed_exit_codes: Sequence[int] = (0,)
    """Exit codes, negative for signals, with which a worker process has left; others are crashes."""
    restart_seconds: float = 1.0
    """First pause before a worker that died is started again; it doubles up to 30 s."""

    def __post_init__(self) -> None:
        self._check_agent()
        for name in ("workers", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.max_rollouts is not None and self.max_rollouts < 1:
            raise ValueError(f"max_rollouts is {self.max_rollouts}; it must be 1 or more")
        if not 1.0 <= self.lease_seconds <= 3600.0:
            raise ValueError(f"lease_seconds is {self.lease_seconds}; it must be between 1 and 3600")
        if self.heartbeat_seconds <= 0:
            raise ValueError(f"heartbeat_seconds is {self.heartbeat_seconds}; it must be above 0")

    def _check_agent(self) -> None:
        if self.isolation not in ISOLATIONS:
            raise ValueError(f"isolation {self.isolation!r} is none of {', '.join(ISOLATIONS)}")
        needs = {"command": ("a command", self.command), "kubernetes": ("a Job template", self.job_template)}
        for kind, (what, given) in needs.items():
            if given and self.isolation != kind:
                raise ValueError(f"{what} goes with isolation {kind}, not with {self.isolation}")
        if self.isolation not in needs:
            if self.agent is None:
                raise ValueError("there is no agent; name one as module:name")
            return
        what, given = needs[self.isolation]
        if not given.strip():
            raise ValueError(f"isolation {self.isolation} needs {what}")
        if self.agent is not None:
            raise ValueError(f"with isolation {self.isolation} the agent is {what}; leave the other one out")

    def worker_id(self, index: int) -> str:
        """The id of the worker with this index; the same again after a restart."""
        return f"{self.name}-{index}"

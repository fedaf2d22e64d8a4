"""The table of commands: name, module, and the line shown by `agl-grpc --help`.

A command is a module of this package with `app: typer.Typer`. It is imported when it is called, so
that help and completion stay quick however heavy the command is.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


class CommandEntry(NamedTuple):
    """One command of `agl-grpc`."""

    module: str
    """Module with `app: typer.Typer`."""
    help: str
    """One line for the list of commands."""


COMMANDS: Mapping[str, CommandEntry] = {
    "store": CommandEntry(
        "agl_grpc_cli.store", "Serve the store over gRPC; back up and verify its database."
    ),
    "runner": CommandEntry("agl_grpc_cli.runner", "Start workers that execute rollouts with your agent."),
    "grader": CommandEntry("agl_grpc_cli.grader", "Judge sealed attempts with your graders."),
    "grade": CommandEntry("agl_grpc_cli.grade", "Grade a run's rollouts anew."),
    "vllm": CommandEntry("agl_grpc_cli.vllm", "Serve a model with vLLM, its exact tokens captured."),
    "proxy": CommandEntry(
        "agl_grpc_cli.proxy", "Capture model calls in front of engines that somebody else runs."
    ),
    "learner": CommandEntry("agl_grpc_cli.learner", "Run the learner (verl) on samples from a store."),
    "checkpoint": CommandEntry("agl_grpc_cli.checkpoint", "List, check and export a run's checkpoints."),
    "train": CommandEntry("agl_grpc_cli.train", "Train an agent."),
    "eval": CommandEntry("agl_grpc_cli.eval", "Evaluate a checkpoint on a dataset; compare two."),
    "agentops": CommandEntry("agl_grpc_cli.agentops", "Serve what the AgentOps SDK calls, offline."),
    "apo": CommandEntry("agl_grpc_cli.apo", "Look at prompt optimisation: versions, critiques, scores."),
    "env": CommandEntry("agl_grpc_cli.env", "Create the environments of engine and learner."),
    "rollouts": CommandEntry("agl_grpc_cli.rollouts", "List, show, cancel, retry and delete rollouts."),
    "spans": CommandEntry("agl_grpc_cli.spans", "List the spans of a rollout."),
    "batch": CommandEntry("agl_grpc_cli.batch", "List, show and replay training batches."),
    "sample": CommandEntry("agl_grpc_cli.sample", "Explain tokens; export samples."),
    "workers": CommandEntry("agl_grpc_cli.workers", "List workers, and order them to leave."),
    "leases": CommandEntry("agl_grpc_cli.leases", "List and expire leases."),
    "runs": CommandEntry("agl_grpc_cli.runs", "List, make, change, pause, resume and compare runs."),
    "blobs": CommandEntry("agl_grpc_cli.blobs", "Store and read blobs."),
}


# Other names of commands, not shown in the list.
ALIASES: Mapping[str, str] = {"run": "runs"}

# What `agl-grpc` itself offers; typer adds it to whatever it is asked to make a command of.
_COMPLETION = ("install_completion", "show_completion")


class LazyGroup(TyperGroup):
    """A group whose subcommands are imported only when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | TyperGroup | None:
        """The command called `cmd_name`, imported now; None when there is none."""
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        entry = COMMANDS.get(cmd_name)
        return load(cmd_name, entry) if entry else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list of commands from the table, importing none of them."""
        if not COMMANDS:
            return
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def load(name: str, entry: CommandEntry) -> TyperCommand | TyperGroup:
    """Imports a command and gives it its name."""
    app = importlib.import_module(entry.module).app
    assert isinstance(app, typer.Typer), f"{entry.module}.app is not a typer.Typer"
    app.rich_markup_mode = None
    command = get_command(app)
    command.name = name
    command.params = [each for each in command.params if each.name not in _COMPLETION]
    assert isinstance(command, TyperCommand | TyperGroup)
    return command

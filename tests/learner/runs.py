"""Learners in processes of their own, with an engine and a worker over the contract: runs without vLLM."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from tests.support.environments import learner_environment, learner_python
from tests.support.store_process import StoreProcess

# Steps between two checkpoints.
SAVE = 4


class Learner:
    """`agl-grpc learner` in a process of its own; ``on_line`` sees every line of its progress."""

    def __init__(
        self, config: Path, store: str, *options: str, on_line: Callable[[str], None] = print
    ) -> None:
        command = [learner_python(), "-m", "agl_grpc_cli", "learner", "--config", str(config)]
        self.lines: list[str] = []
        self._on_line = on_line
        self.process = subprocess.Popen(
            [*command, "--store", store, *options],
            env=learner_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("learner: "):
                self._on_line(line)

    def finish(self) -> int:
        """Waits for the end; the exit code."""
        try:
            return self.process.wait(300)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()


def make_folder(tmp_path: Path) -> Path:
    """Model and tasks of a run in a folder."""
    code = "import sys; from pathlib import Path; from tests.learner.trainer_script import make_model; "
    model = tmp_path / "model"
    subprocess.run(
        [learner_python(), "-c", code + "make_model(Path(sys.argv[1]))", str(model)],
        env=learner_environment(),
        check=True,
        capture_output=True,
        timeout=120,
    )
    (tmp_path / "tasks.jsonl").write_text("".join(f'{{"n": {number}}}\n' for number in range(48)))
    return tmp_path


def configure(folder: Path, steps: int) -> Path:
    """Writes the configuration of a run of so many steps, saved every `SAVE`; its path."""
    config: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "name": "tiny"},
        "train_tasks": str(folder / "tasks.jsonl"),
        "output_dir": str(folder / "out"),
        "training_run_id": "tr_e2e",
        "deadlines": {"sample": 60, "publish": 60, "engines": 60},
        "verl": {
            "data.train_batch_size": 4,
            "actor_rollout_ref.rollout.n": 8,
            "actor_rollout_ref.actor.optim.lr": 5e-3,
            "trainer.total_epochs": 1000,
            "trainer.total_training_steps": steps,
            "trainer.save_freq": SAVE,
        },
    }
    path = folder / "run.json"
    path.write_bytes(orjson.dumps(config))
    return path


@contextmanager
def served(
    store: StoreProcess, folder: Path, *models: str, runs: tuple[str, ...] = ("default",)
) -> Iterator[None]:
    """Engines of these models and a worker for each run; of two models the second makes second calls."""
    command = [learner_python(), "-m", "tests.learner.contract_engine", store.address]
    log = (folder / "engine.log").open("w")
    process = subprocess.Popen(
        [*command, ",".join(runs), str(folder / "model"), *models],
        env=learner_environment(),
        stdout=log,
        stderr=log,
    )
    try:
        yield
        assert process.poll() is None, (folder / "engine.log").read_text()
    finally:
        process.kill()
        process.wait()
        log.close()

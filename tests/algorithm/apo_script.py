"""A user's program that runs APO: `python -m tests.algorithm.apo_script FOLDER ENDPOINT [resume]`."""

from __future__ import annotations

import sys

from agl_grpc import Trainer
from agl_grpc.algorithm import APO
from tests.algorithm.words import FIRST, wordy


def main(folder: str, endpoint: str, *more: str) -> None:
    """Two rounds of two branches of two parents: 16 calls of the critic."""
    apo = APO(
        endpoint=endpoint,
        gradient_model="critic",
        apply_edit_model="editor",
        beam_width=2,
        branch_factor=2,
        beam_rounds=2,
        gradient_batch_size=2,
    )
    trainer = Trainer(
        algorithm=apo,
        initial_resources={"prompt": FIRST},
        strategy="shm",
        run_name="words",
        run_dir=folder,
        resume="resume" in more,
    )
    tasks = [{"question": f"t{number}"} for number in range(6)]
    trainer.fit(wordy, tasks, val_dataset=tasks[:4])


if __name__ == "__main__":
    main(*sys.argv[1:])

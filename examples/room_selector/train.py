"""`python -m examples.room_selector.train`: improves the agent's prompt with APO, or with GEPA.

Without arguments scripted models stand in for real ones, so that it runs anywhere and always the same. With
``--endpoint`` (and a key in ``OPENAI_API_KEY``) agent and critic are real models.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agl_grpc import Trainer
from agl_grpc.algorithm import APO, GEPA
from agl_grpc.trainer import FitResult
from examples.room_selector.agent import FIRST, choose_room
from examples.room_selector.rooms import TRAIN, VAL
from examples.room_selector.scripted import scripted_endpoint


def train(
    *,
    algorithm: str = "apo",
    endpoint: str = "",
    model: str = "agent",
    critic: str = "critic",
    editor: str = "editor",
    run_dir: Path = Path("runs"),
    **more: Any,
) -> FitResult:
    """One run; an empty endpoint means the scripted models."""
    with ExitStack() as stack:
        endpoint = endpoint or stack.enter_context(scripted_endpoint())
        os.environ.update(ROOMS_ENDPOINT=endpoint, ROOMS_MODEL=model)
        chosen: APO | GEPA
        if algorithm == "apo":
            chosen = APO(
                endpoint=endpoint,
                gradient_model=critic,
                apply_edit_model=editor,
                beam_width=2,
                branch_factor=2,
                beam_rounds=5,
            )
        else:
            chosen = GEPA(endpoint=endpoint, reflection_model=critic, max_iterations=10)
        trainer = Trainer(
            algorithm=chosen, initial_resources={"prompt": FIRST}, n_runners=2, run_dir=run_dir, **more
        )
        return trainer.fit(choose_room, TRAIN, val_dataset=VAL)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", choices=("apo", "gepa"), default="apo")
    parser.add_argument("--endpoint", default="", help="base URL of an OpenAI-compatible endpoint")
    parser.add_argument("--model", default="agent", help="the agent's model")
    parser.add_argument("--critic", default="critic")
    parser.add_argument("--editor", default="editor")
    parser.add_argument("--run", default=None, help="the run's name")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    if given.algorithm == "gepa" and not given.endpoint:
        parser.error("GEPA needs a real model: give --endpoint")
    train(
        algorithm=given.algorithm,
        endpoint=given.endpoint,
        model=given.model,
        critic=given.critic,
        editor=given.editor,
        run_name=given.run,
        resume=given.resume,
    )


if __name__ == "__main__":
    main()

"""verl's reward workers as graders, in a Ray of their own; `test_reward_loop_e2e.py` runs it.

Prints what became of submissions judged by a custom reward function, by a reward model, and of settings that
cannot be.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from agl_grpc.grader.grade import GraderFailed
from agl_grpc.grader.isolated import graded
from agl_grpc.grader.submission import Submission
from agl_grpc.learner.batch.tokens import decoder
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.verl.config import compose
from agl_grpc.learner.verl.ray_runtime import local_ray
from agl_grpc.learner.verl.reward_loop import VerlGrader, start_workers, take_rewards, version_of
from agl_grpc.model.span import Span
from agl_grpc.v1 import model_call_pb2, span_pb2
from tests.learner.trainer_script import make_model

FUNCTION = """
async def judge(data_source, solution_str, ground_truth, extra_info, **more):
    if ground_truth == "raise":
        raise LookupError("no such truth")
    if ground_truth == "nan":
        return float("nan")
    right = solution_str == ground_truth
    return {"score": 2.0 * right, "acc": right, "source": data_source, "task": extra_info["task"]["name"]}
"""


def submission(model: Path, task: Any, *, answered: bool = True) -> Submission:
    """An attempt with one call, which answered t5 t6; without a call if it did not."""
    call = model_call_pb2.ModelCall(
        prompt=model_call_pb2.PromptTokens(token_ids=[3, 4]),
        choices=[model_call_pb2.Choice(token_ids=[5, 6], finish_reason="stop")],
    )
    stored = span_pb2.StoredSpan(span=span_pb2.Span(name="chat", model_call=call))
    spans = [Span.from_proto(stored)] if answered else []
    return Submission(input=task, spans=spans, decode=decoder(model))


def settings(model: Path, **rewards: Any) -> DictConfig:
    keys = {"actor_rollout_ref.model.path": str(model), **rewards}
    return compose(keys, device="cpu")


def taken(model: Path, endpoint: str = "", **rewards: Any) -> Any:
    """Number of reward workers and what the trainer's own are left with, or the error."""
    config = settings(model, **rewards)
    try:
        found = take_rewards(config, endpoint)
    except ConfigError as error:
        return str(error)
    left = [config.reward.num_workers, config.reward.reward_model.enable]
    return [None if found is None else found.reward.num_workers, *left]


async def judged(grader: VerlGrader, given: Submission) -> dict[str, Any]:
    try:
        grade = await graded(grader, given)
    except GraderFailed as error:
        return {"outcome": error.outcome, "said": str(error)}
    return {"value": grade.value, "components": grade.components, "notes": grade.notes}


def main(folder: Path, endpoint: str) -> dict[str, Any]:
    model, function = folder / "model", folder / "rewards.py"
    make_model(model)
    function.write_text(FUNCTION)
    custom: dict[str, Any] = {
        "reward.custom_reward_function.path": str(function),
        "reward.custom_reward_function.name": "judge",
    }
    scored: dict[str, Any] = {
        "reward.reward_model.enable": True,
        "reward.reward_model.model_path": str(model),
    }
    outcomes: dict[str, Any] = {
        "nothing": taken(model),
        "custom": taken(model, **custom),
        "old_names": taken(model, **{"custom_reward_function.path": str(function)}),
        "without_engine": taken(model, **scored),
        "without_model": taken(model, endpoint),
    }
    own = take_rewards(settings(model, **custom), "")
    served = take_rewards(settings(model, **scored), endpoint)
    assert own is not None
    assert served is not None
    # A Ray of its own for each: verl's workers have fixed names.
    with local_ray(device="cpu", gpus=1, others=1):
        grader = VerlGrader(start_workers(own, ""), version_of(own))
        tasks = {
            "right": {"name": "a", "answer": "t5t6"},
            "verls_form": {"name": "b", "data_source": "maths", "reward_model": {"ground_truth": "t5"}},
            "raises": {"name": "c", "answer": "raise"},
            "nan": {"name": "d", "answer": "nan"},
        }
        for name, task in tasks.items():
            outcomes[name] = asyncio.run(judged(grader, submission(model, task)))
        outcomes["no_answer"] = asyncio.run(judged(grader, submission(model, {}, answered=False)))
    with local_ray(device="cpu", gpus=1, others=1):
        other = VerlGrader(start_workers(served, endpoint), version_of(served))
        outcomes["scored"] = asyncio.run(judged(other, submission(model, {})))
    missing = OmegaConf.merge(own, {"reward": {"custom_reward_function": {"name": "nobody"}}})
    assert isinstance(missing, DictConfig)
    with local_ray(device="cpu", gpus=1, others=1):
        try:
            start_workers(missing, "")
        except ConfigError as error:
            outcomes["missing"] = str(error)
    function.write_text(FUNCTION + "# another\n")
    outcomes["versions"] = len({version_of(own), grader.version, other.version})
    return outcomes


if __name__ == "__main__":
    print("\n" + json.dumps(main(Path(sys.argv[1]), sys.argv[2])))

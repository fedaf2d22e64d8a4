"""A run whose engine verl starts, and its agent, which says what tokens that engine told it of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import orjson

import agl_grpc
from agl_grpc.algorithm import VERL
from agl_grpc.trainer import Trainer
from tests.support.environments import hybrid_python

MODEL, RUN = "tiny", "hybrid"
GROUPS, GROUP_SIZE = 4, 4
CONFIG = {
    "data.train_batch_size": GROUPS,
    "data.max_response_length": 16,
    "actor_rollout_ref.rollout.n": GROUP_SIZE,
    "actor_rollout_ref.rollout.max_model_len": 256,
    "actor_rollout_ref.rollout.max_num_seqs": 16,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 512,
    "actor_rollout_ref.actor.optim.lr": 1e-3,
}
# Of the engine that validates once verl's has ended.
_SMALL = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16"),
    *("--max-num-batched-tokens", "512", "--enforce-eager"),
)


def trainer(folder: Path, model: Path, steps: int, seed: int, *, save_every: int, **options: Any) -> Trainer:
    """One that trains the model in its own folder of the runs; ``options`` are the trainer's."""
    return Trainer(
        algorithm=VERL(
            {
                **CONFIG,
                "actor_rollout_ref.model.path": str(model),
                "trainer.total_training_steps": steps,
                "trainer.save_freq": save_every,
            },
            model_name=MODEL,
            engines={"hybrid": True},
            samples={"truncated": "train"},
            seed=seed,
        ),
        learner_python=hybrid_python(),
        n_runners=1,
        runner={"concurrency": GROUPS * GROUP_SIZE},
        llm_proxy={"arguments": _SMALL},
        validation={"samples": 1, "greedy": False, "every": 0},
        run_name=RUN,
        run_dir=folder,
        **options,
    )


def tasks(steps: int) -> list[dict[str, int]]:
    """As many as the steps take."""
    return [{"number": number} for number in range(steps * GROUPS)]


@agl_grpc.llm_rollout
async def agent(task: dict[str, int], llm: agl_grpc.LLM) -> float:
    """One short answer; the reward is the share of its characters that are lower-case letters."""
    question = f"say {task['number']}"
    async with openai.AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key or "none") as client:
        answer = await client.chat.completions.create(
            model=llm.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=12,
            extra_body={"return_token_ids": True},
            **llm.sampling_parameters,
        )
    told, choice = answer.model_dump(), answer.choices[0]
    ids = {"prompt": told["prompt_token_ids"], "sampled": told["choices"][0]["token_ids"]}
    agl_grpc.emit_message(orjson.dumps(ids).decode())
    text = choice.message.content or ""
    return sum("a" <= letter <= "z" for letter in text) / max(1, len(text))

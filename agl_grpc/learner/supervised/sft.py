"""Supervised fine-tuning on trajectories that did well: the rows of reinforcement learning, verl's SFT loss.

One process, one device. The sampled tokens of every kept rollout are learned; observations are masked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agl_grpc.learner.checkpoints.checkpoint import LearnerState, checkpoint_id, write_checkpoint
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.rollouts.attempts import read_attempts
from agl_grpc.learner.run_config import SftConfig
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.learner.supervised.selection import Judged, best_of_groups
from agl_grpc.model.enums import RolloutMode, RolloutStatus
from agl_grpc.sample import AttemptSamples, Sample, SampleRules

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from tensordict import TensorDict

_READ_AT_ONCE = 256


@dataclass(frozen=True)
class Trajectories:
    """What was kept, and how many rollouts were looked at."""

    rows: tuple[Sample, ...]
    kept: int
    seen: int


def collect(link: StoreLink, run_id: str, rules: SampleRules, sft: SftConfig) -> Trajectories:
    """The rows of a run's succeeded training rollouts with enough reward.

    Raises:
        ConfigError: nothing is left.
    """
    attempts = link.run(_read(link, run_id, rules))
    judged = [
        Judged(each.rollout_id, each.group_id or each.rollout_id, each.reward)
        for each in attempts
        if each.rows and each.reward is not None
    ]
    chosen = best_of_groups(judged, sft.best_of_group, sft.min_reward)
    found = {each.rollout_id: each for each in attempts}
    kept = [found[rollout_id] for rollout_id in chosen]
    rows = tuple(row for each in kept for row in each.rows)
    if not rows:
        best = max((each.reward for each in attempts if each.reward is not None), default=None)
        raise ConfigError(
            f"no rollout of run {run_id!r} has rows and a reward of {sft.min_reward:g} or more "
            f"(sft.min_reward); {len(attempts)} succeeded, the best reward is {best}"
        )
    return Trajectories(rows, len(kept), len(attempts))


async def _read(link: StoreLink, run_id: str, rules: SampleRules) -> list[AttemptSamples]:
    client = link.client
    rollouts = await client.query_rollouts(run_id=run_id, status_in=[RolloutStatus.SUCCEEDED])
    usable = [each for each in rollouts if each.sealed and each.mode is RolloutMode.TRAIN]
    made: list[AttemptSamples] = []
    for start in range(0, len(usable), _READ_AT_ONCE):
        made += await read_attempts(client, usable[start : start + _READ_AT_ONCE], rules)
    return made


def batch_of(rows: Sequence[Sample]) -> TensorDict:
    """Rows as verl's SFT loss takes them: jagged tensors, the loss mask over the whole sequence."""
    import torch
    from verl.utils import tensordict_utils

    def nested(arrays: list[Any]) -> torch.Tensor:
        tensors = [torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in arrays]
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    masks = [np.concatenate([np.zeros(len(row.prompt_ids)), row.response_mask]) for row in rows]
    columns = {
        "prompts": nested([row.prompt_ids for row in rows]),
        "responses": nested([row.response_ids for row in rows]),
        "response_mask": nested([row.response_mask for row in rows]),
        "input_ids": nested([np.concatenate([row.prompt_ids, row.response_ids]) for row in rows]),
        "position_ids": nested([np.arange(len(row.prompt_ids) + len(row.response_ids)) for row in rows]),
        "loss_mask": nested(masks),
    }
    settings = {"temperature": 1.0, "global_batch_size": len(rows), "calculate_entropy": False}
    return tensordict_utils.get_tensordict(columns, settings)


def make_worker(config: DictConfig) -> Any:
    """verl's training worker for the actor's model, engine and optimiser, in this process."""
    import torch
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import sft_loss

    if not torch.distributed.is_initialized():
        _single_rank()
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    settings = TrainingWorkerConfig(
        model_type="language_model",
        model_config=actor.model_config,
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    engine = settings.engine_config
    engine.use_dynamic_bsz = actor.use_dynamic_bsz
    engine.max_token_len_per_gpu = actor.ppo_max_token_len_per_gpu
    engine.micro_batch_size_per_gpu = actor.ppo_micro_batch_size_per_gpu
    engine.use_remove_padding = actor.model_config.get("use_remove_padding", False)
    worker = TrainingWorker(config=settings)
    worker.reset()
    worker.set_loss_fn(functools.partial(sft_loss, config=actor))
    return worker


def _single_rank() -> None:
    """Makes this process the only rank of a process group; verl's engines ask for one."""
    import os

    import torch

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)})
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def train(
    config: DictConfig,
    sft: SftConfig,
    trajectories: Trajectories,
    seed: int,
    on_step: Callable[[int, int, dict[str, float]], bool],
) -> tuple[Any, int]:
    """Trains on all rows for ``sft.epochs`` epochs; the worker and the number of steps.

    Args:
        config: verl's configuration as ``verl_config.compose`` makes it; a step is
            ``data.train_batch_size`` rows.
        sft: epochs.
        trajectories: what to learn.
        seed: of the rows' order, and of parameters that begin at random.
        on_step: called with step, number of all steps and metrics; answers whether to stop.
    """
    from verl.utils import tensordict_utils

    from agl_grpc.learner.verl.seeding import seed_process

    seed_process(seed)
    worker = make_worker(config)
    rows, size = trajectories.rows, int(config.data.train_batch_size)
    generator = np.random.default_rng(seed)
    total = sft.epochs * -(-len(rows) // size)
    step = 0
    for _ in range(sft.epochs):
        order = generator.permutation(len(rows))
        for start in range(0, len(rows), size):
            chosen = [rows[place] for place in order[start : start + size]]
            batch = batch_of(chosen)
            tensordict_utils.assign_non_tensor(batch, mini_batch_size=len(chosen), epochs=1)
            output = worker.train_mini_batch(batch)
            found = tensordict_utils.get(output.get() if hasattr(output, "futures") else output, "metrics")
            step += 1
            metrics = {
                f"sft/{name}": float(np.sum(value)) for name, value in found.items() if _is_number(value)
            }
            metrics["tokens/trained"] = float(sum(int(row.response_mask.sum()) for row in chosen))
            metrics["training/rows"] = float(len(chosen))
            if on_step(step, total, metrics):
                return worker, step
    return worker, step


def _is_number(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, int | float) for each in values)


def save(worker: Any, folder: Path, step: int, origin: int) -> Path:
    """Saves the worker's model as one checkpoint below ``folder``."""

    def fill(place: Path) -> LearnerState:
        worker.save_checkpoint(str(place / "actor"), None, step, max_ckpt_to_keep=None)
        return LearnerState(step, prompts_fetched=0, origin=origin)

    return write_checkpoint(folder, checkpoint_id(step), fill)

"""The same rollouts through verl's own in-process path: no store, no Ray, no TransferQueue, no code of ours.

Rows are padded left and right as verl's agent loop pads them, advantages come from verl's
``compute_advantage``, the update from verl's ``TrainingWorker``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from agl_grpc.learner.batch.rows import queue_rows
from agl_grpc.learner.credit.advantage import PREFIX
from agl_grpc.learner.rollouts.groups import FinishedGroup

PAD = 0
_ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def single_rank() -> None:
    """Makes this process the only rank of a gloo group."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    os.environ.update({**_ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)})
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def worker(model: str, learning_rate: float, micro_batch: int = 16) -> TrainingWorker:
    """verl's training worker with plain gradient descent, in this process."""
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        use_torch_compile=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro_batch,
        infer_micro_batch_size_per_gpu=micro_batch,
        max_token_len_per_gpu=4096,
        infer_max_token_len_per_gpu=4096,
        forward_only=False,
    )
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=model,
                use_remove_padding=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(
                optimizer="SGD",
                lr=learning_rate,
                total_training_steps=10,
                weight_decay=0.0,
                clip_grad=1e9,
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    made.reset()
    return made


def padded(groups: Sequence[FinishedGroup]) -> DataProto:
    """The rows of the groups as verl's agent loop hands them over; ``uid`` is the group."""
    rows = [
        (group.request.uid, rollout, row)
        for group in groups
        for rollout in group.rollouts
        for row in rollout.rows
    ]
    width = [max(len(getattr(row, name)) for _, _, row in rows) for name in ("prompt_ids", "response_ids")]
    shape = (len(rows), sum(width))
    columns = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    response = {
        name: torch.zeros(len(rows), width[1]) for name in ("response_mask", "rm_scores", "rollout_log_probs")
    }
    columns["input_ids"].fill_(PAD)
    for place, (_, rollout, row) in enumerate(rows):
        start, length = width[0] - len(row.prompt_ids), len(row.response_ids)
        tokens = np.concatenate([row.prompt_ids, row.response_ids])
        columns["input_ids"][place, start : start + len(tokens)] = torch.from_numpy(tokens)
        columns["attention_mask"][place, start : start + len(tokens)] = 1
        response["response_mask"][place, :length] = torch.from_numpy(row.response_mask)
        response["rollout_log_probs"][place, :length] = torch.from_numpy(row.logprobs)
        response["rm_scores"][place, length - 1] = float(rollout.reward or 0.0)
    columns["position_ids"] = (columns["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    columns["prompts"] = columns["input_ids"][:, : width[0]]
    columns["responses"] = columns["input_ids"][:, width[0] :]
    response_mask = response.pop("response_mask").long()
    return DataProto.from_dict(
        tensors={**columns, **response, "response_mask": response_mask},
        non_tensors={"uid": np.array([uid for uid, _, _ in rows], dtype=object)},
    )


def _unpadded(data: DataProto, size: int) -> TensorDict:
    batch = left_right_2_no_padding(data.batch.clone())
    settings = {
        "temperature": 1.0,
        "use_remove_padding": False,
        "pad_token_id": PAD,
        "use_dynamic_bsz": False,
    }
    for name, value in {**settings, "global_batch_size": size, "micro_batch_size_per_gpu": 16}.items():
        tensordict_utils.assign_non_tensor(batch, **{name: value})
    return batch


def _result(output: Any) -> Any:
    return output.get() if hasattr(output, "get") and not hasattr(output, "keys") else output


def advantages_of(data: DataProto) -> DataProto:
    """verl's GRPO on padded rows."""
    data.batch["token_level_rewards"] = data.batch["rm_scores"]
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "gamma": 1.0, "lam": 1.0})
    return compute_advantage(data, adv_estimator="grpo", config=config)


def old_log_probs(training: TrainingWorker, data: DataProto) -> torch.Tensor:
    """Logprobs of the padded rows' responses under the worker's weights."""
    probe = _unpadded(data, len(data))
    tensordict_utils.assign_non_tensor(probe, compute_loss=False, calculate_entropy=False)
    return _responses(_result(training.infer_batch(probe))["log_probs"], data)


def update(training: TrainingWorker, batch: TensorDict, loss: str) -> dict[str, Any]:
    """One update; its metrics."""
    size = len(batch)
    tensordict_utils.assign_non_tensor(batch, mini_batch_size=size, epochs=1, calculate_entropy=False)
    actor = FSDPActorConfig(
        strategy="fsdp2",
        ppo_mini_batch_size=size,
        ppo_micro_batch_size_per_gpu=16,
        rollout_n=1,
        use_dynamic_bsz=False,
        policy_loss=PolicyLossConfig(loss_mode=loss, dro_beta=0.1),
    )
    training.set_loss_fn(functools.partial(ppo_loss, config=actor))
    metrics: dict[str, Any] = tensordict_utils.get(_result(training.train_mini_batch(batch)), "metrics")
    return metrics


def step(training: TrainingWorker, data: DataProto, loss: str) -> dict[str, Any]:
    """One update on padded rows: advantages of every row, metrics, and the parameters afterwards."""
    data.batch["old_log_probs"] = old_log_probs(training, data)
    data = advantages_of(data)
    metrics = update(training, _unpadded(data, len(data)), loss)
    parameters, _ = training.engine.get_per_tensor_param()
    return {
        "advantages": data.batch["advantages"],
        "metrics": metrics,
        "weights": {name: tensor.detach().clone() for name, tensor in parameters},
    }


def rows_of_ours(groups: Sequence[FinishedGroup]) -> TensorDict:
    """The same rollouts as our manager puts them into the TransferQueue, with our advantages."""
    entries = [
        entry.fields
        for group in groups
        for number, rollout in enumerate(group.rollouts)
        for entry in queue_rows(group.request, number, rollout, "default")
    ]
    # As the TransferQueue gives them to workers: every tensor jagged.
    names = [name for name, value in entries[0].items() if isinstance(value, torch.Tensor)]
    columns = {
        name: torch.nested.as_nested_tensor([entry[name] for entry in entries], layout=torch.jagged)
        for name in names
    }
    batch = tensordict_utils.get_tensordict(columns)
    padded_rows = batch.select("rm_scores", "response_mask").to_padded_tensor()
    labels = np.array([entry["uid"] for entry in entries], dtype=object)
    estimator = get_adv_estimator_fn(PREFIX + "grpo")
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False})
    found, _ = estimator(padded_rows["rm_scores"], padded_rows["response_mask"], config, index=labels)
    batch["advantages"] = _jagged(found, batch)
    settings = {
        "temperature": 1.0,
        "use_remove_padding": False,
        "pad_token_id": PAD,
        "use_dynamic_bsz": False,
    }
    for name, value in {**settings, "global_batch_size": len(batch), "micro_batch_size_per_gpu": 16}.items():
        tensordict_utils.assign_non_tensor(batch, **{name: value})
    return batch


def step_of_ours(training: TrainingWorker, groups: Sequence[FinishedGroup]) -> dict[str, Any]:
    """One update on our rows, however many each rollout has: rows, updates, and the parameters afterwards."""
    rows = rows_of_ours(groups)
    rows["old_log_probs"] = rows["rollout_log_probs"]
    metrics = update(training, rows, "vanilla")
    parameters, _ = training.engine.get_per_tensor_param()
    return {
        "rows": len(rows),
        "updates": int(np.size(metrics["grad_norm"])),
        "weights": {name: tensor.detach().clone() for name, tensor in parameters},
    }


def _jagged(values: torch.Tensor, batch: TensorDict) -> torch.Tensor:
    lengths = batch["responses"].offsets().diff().tolist()
    rows = [row[:length] for row, length in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def losses(model: str, groups: Sequence[FinishedGroup], names: Sequence[str]) -> dict[str, list[float]]:
    """Loss and gradient norm of each policy loss: of verl's own rows, then of ours.

    The old logprobs are a little off the weights', so that ratios are not 1 and some are clipped.
    """
    training = worker(model, 0.0)
    data = padded(groups)
    old = old_log_probs(training, data)
    old = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    data.batch["old_log_probs"] = old
    data = advantages_of(data)
    found = {}
    for name in names:
        theirs = update(training, _unpadded(data, len(data)), name)
        mine = rows_of_ours(groups)
        mine["old_log_probs"] = _jagged(old, mine)
        ours = update(training, mine, name)
        found[name] = [
            float(np.sum(each[key])) for each in (theirs, ours) for key in ("actor/pg_loss", "grad_norm")
        ]
    return found


def _responses(nested: torch.Tensor, data: DataProto) -> torch.Tensor:
    """The response part of per-token values of whole sequences, each shifted by one, padded right."""
    width = data.batch["responses"].shape[1]
    values = torch.zeros(len(data), width)
    prompts = data.batch["attention_mask"][:, :-width].sum(-1).tolist()
    lengths = data.batch["attention_mask"][:, -width:].sum(-1).tolist()
    for place, (row, prompt, length) in enumerate(zip(nested.unbind(), prompts, lengths, strict=True)):
        values[place, :length] = row[prompt - 1 : prompt - 1 + length]
    return values

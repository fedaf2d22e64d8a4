"""verl's v1 trainer for engines and agents outside verl.

A subclass of verl's ``separate_async`` trainer; what is changed is where rollouts come from, that
mini-batches are whole rollouts, that every batch is proven before it is used, and how weights and checkpoints
leave.
"""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import orjson
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode, PPOTrainerSeparateAsync
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions
from verl.workers.rollout.llm_server import LLMServerManager
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from agl_grpc.learner.batch.step_metrics import batch_metrics, unfinished
from agl_grpc.learner.checkpoints.checkpoint import LearnerState
from agl_grpc.learner.credit.advantage import PREFIX, credit_turns
from agl_grpc.learner.credit.correction import correct_over_rollouts
from agl_grpc.learner.credit.turn_credit import NAME as TURNS
from agl_grpc.learner.errors import (
    ConfigError,
    FidelityError,
    LearnerError,
    MemoryExhaustedError,
    StoppedError,
)
from agl_grpc.learner.hooks import Hooks
from agl_grpc.learner.phases import phase
from agl_grpc.learner.proofs import ProvesBatches, real_keys
from agl_grpc.learner.rollouts.curriculum import OrderedTasks
from agl_grpc.learner.rollouts.groups import ClaimedBatch
from agl_grpc.learner.supervised.best_of import TEMPERATURE, LearnsBest
from agl_grpc.learner.verl.config import HYBRID_KEY
from agl_grpc.learner.verl.following import FollowingSampler
from agl_grpc.learner.verl.keys import OUTCOME_ESTIMATORS, SEQUENCE_LOSSES
from agl_grpc.learner.verl.local_queue import texts
from agl_grpc.learner.verl.manager import RolloutManager
from agl_grpc.learner.verl.prompts import AsksForPrompts
from agl_grpc.learner.verl.sampler import StoreSampler
from agl_grpc.learner.verl.seeding import seeded_workers

# Errors that end training at a step whose predecessor can still be saved, and what they are counted as.
_ERRORS = {
    MemoryExhaustedError: "out_of_memory",
    FidelityError: "fidelity",
    ConfigError: "configuration",
}

# verl looks the class up by name even when it creates no replica of it.
RolloutReplicaRegistry.register("agl_external", lambda: RolloutReplica)


class NoServers(LLMServerManager):  # type: ignore[misc]  # verl is untyped
    """verl's manager of its own engines, of which there are none: nor is there anything to balance."""

    async def _init_global_load_balancer(self) -> None:
        # verl's would be a process of its own that imports all of verl.
        self.global_load_balancer = None


def balanced(seqlen_list: Any, k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Stands where verl shares rows out: one rank takes all as they are, which verl finds out slowly."""
    if k_partitions == 1:
        return [list(range(len(seqlen_list)))]
    shared: list[list[int]] = get_seqlen_balanced_partitions(seqlen_list, k_partitions, equal_size)
    return shared


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value) for name, value in metrics.items() if isinstance(value, int | float | np.number)
    }


@register_trainer("agl")
class AglTrainer(
    AsksForPrompts,
    OrderedTasks,
    LearnsBest,
    ProvesBatches,
    PPOTrainerSeparateAsync,  # type: ignore[misc]  # verl is untyped
):
    """Trains on sealed rollouts of a store and publishes weights as policy versions.

    Args:
        config: verl's configuration as ``verl_config.compose`` makes it.
        hooks: rollouts, publication, checkpoints and limits.
    """

    # verl's: the step that is being made, from 1.
    global_steps: int

    def __init__(self, config: DictConfig, hooks: Hooks) -> None:
        self.hooks = hooks
        self.prompts_fetched = 0
        self.uncommitted: list[ClaimedBatch] = []
        self._claims = ThreadPoolExecutor(1, thread_name_prefix="claim")
        self._claimed: ClaimedBatch | None = None
        self._claimed_in_step: list[ClaimedBatch] = []
        # Whether a parameter may have changed since the step began.
        self._updating = False
        # The step whose state was saved last; -1 = none.
        self._saved_step = -1
        self._counts: Counter[str] = Counter()
        self._left_over: deque[tuple[int, int]] = deque()
        if config.algorithm.adv_estimator in OUTCOME_ESTIMATORS:
            config.algorithm.adv_estimator = PREFIX + config.algorithm.adv_estimator
        super().__init__(config)

    def _build_replay_buffer(self) -> StoreSampler:
        sampler = self.config.trainer.v1.sampler
        custom = sampler.get("custom_sampler", None)
        if custom is not None and custom.get("path"):
            raise ConfigError(
                "trainer.v1.sampler.custom_sampler cannot be set: the learner brings its own sampler"
            )
        ask, leaders = self._add_prompts_to_generate, self.hooks.leaders_batch
        make = partial(StoreSampler, replay=self.hooks.replay, refill_fn=ask)
        if leaders is not None:
            make = partial(FollowingSampler, leaders_batch=leaders, ask_for_prompts=ask)
        return make(
            sample_deadline=self.hooks.deadlines.sample,
            failure_limit=self.hooks.failure_limit,
            trainer_mode=self.trainer_mode,
            trainer_config=self.config.trainer.v1.get(self.trainer_mode, {}),
            max_off_policy_threshold=sampler.max_off_policy_threshold,
            max_off_policy_strategy=sampler.max_off_policy_strategy,
            sampler_kwargs=sampler.sampler_kwargs,
            filter_groups_metric=self._resolve_filter_groups_metric(),
        )

    def deadline_of(self, key: str) -> float:
        """Seconds that a phase may take, by its name in ``deadlines``."""
        return float(getattr(self.hooks.deadlines, key))

    def worker_groups(self) -> dict[str, Any]:
        """verl's worker groups that have been started, by role."""
        roles = {"actor": "actor_rollout_wg", "critic": "critic_wg", "reference": "ref_policy_wg"}
        return {role: getattr(self, name) for role, name in roles.items() if hasattr(self, name)}

    @phase("starting verl's workers", "start")
    def _setup(self) -> None:
        workers = partial(seeded_workers, int(self.config.data.seed))
        # Not the direct parent's: it would start replicas of verl's own engines.
        with (
            patch.object(trainer_base, "LLMServerManager", NoServers),
            patch.object(trainer_base, "RayWorkerGroup", workers),
        ):
            PPOTrainer._setup(self)
        if self.hooks.queue is not None:
            self.hooks.queue.bridge(self.worker_groups().values())
        if self.learns_best:
            self.use_supervised_loss()
        if HYBRID_KEY in (self.config.actor_rollout_ref.rollout.get("custom") or {}):
            # Only here: vLLM is in the hybrid environment alone.
            from agl_grpc.learner.verl.hybrid import start_engines

            self.llm_server_manager = start_engines(self.config, self.actor_rollout_wg)
        self.hooks.publication.bind(self.actor_rollout_wg)
        self.standalone_checkpoint_manager = self.hooks.publication
        self.current_mode = HybridEngineMode.TRAINER

    def get_llm_client(self) -> None:
        """verl's agent loops would call engines through it; agents here call the engines themselves."""

    def fit(self, agent_loop_manager: RolloutManager) -> None:
        self.replay_buffer.bind(agent_loop_manager)
        try:
            super().fit(agent_loop_manager)
        except StoppedError as asked:
            # While it waited for rollouts, which the run's other learners may never let come.
            self.hooks.say(f"{asked}: {self._save_before_failed_step()}")
        except (MemoryExhaustedError, FidelityError, ConfigError) as error:
            # Workers live, and data or configuration are at fault: what was trained before is kept.
            self.hooks.on_error(self.global_steps, _ERRORS[type(error)])
            raise type(error)(f"{error}; {self._save_before_failed_step()}") from error

    def _save_before_failed_step(self) -> str:
        """Saves what was trained before the step that failed, if that state is still there; says what
        came of it.
        """
        trained = [batch for batch in self.uncommitted if batch not in self._claimed_in_step]
        self.uncommitted = trained if not self._updating else self.uncommitted
        if not trained:
            return "nothing that is not in a checkpoint was trained"
        if self._updating:
            return "the failed step may have changed weights: nothing was saved, resume from the checkpoint"
        failed = self.global_steps
        self.global_steps = failed - 1
        self.replay_buffer.put_back()
        if self.order is not None:
            self.order.put_back()
        try:
            self._save_checkpoint()
            self.hooks.checkpoints.commit(self)
        except LearnerError as error:
            return f"a checkpoint of step {failed - 1} could not be saved ({error})"
        return f"everything before step {failed} is in a checkpoint"

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self._updating = False
        self._counts.clear()
        self._claimed_in_step.clear()
        self.replay_buffer.begin_step()

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        # Mini-batches are whole rollouts, so rows are padded to the data-parallel size only.
        return dp_size

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict[str, Any], **kwargs: Any) -> KVBatchMeta:
        if not batch.keys:
            raise LearnerError(
                f"no rollout of step {self.global_steps} has anything to train: "
                f"{self.agent_loop_manager.last_failure or 'no call of this model'}"
            )
        (of_rows,) = texts(self.hooks.queue, batch.keys, batch.partition_id, "rollout_id")
        rollout_ids = list(dict.fromkeys(of_rows))
        self._start_claim(rollout_ids)
        self._check_rows_per_rollout(len(batch.keys), len(rollout_ids))
        metrics["training/rows"], metrics["training/rollouts"] = len(batch.keys), len(rollout_ids)
        with patch.object(trainer_base, "get_seqlen_balanced_partitions", balanced):
            return super()._balance_batch(batch, metrics, **kwargs)

    def _check_rows_per_rollout(self, rows: int, rollouts: int) -> None:
        if rows > rollouts and self.config.algorithm.adv_estimator == "gae":
            raise ConfigError(
                f"algorithm.adv_estimator=gae needs rollouts of one row each, and {rollouts} rollouts have "
                f"{rows} rows: use an agent whose prompts grow turn by turn, or an outcome estimator "
                "such as grpo"
            )
        actor = self.config.actor_rollout_ref.actor
        loss = actor.policy_loss.loss_mode
        if rows > rollouts and loss in SEQUENCE_LOSSES:
            raise ConfigError(
                f"actor_rollout_ref.actor.policy_loss.loss_mode={loss} weighs rows as sequences, and "
                f"{rollouts} rollouts have {rows} rows: use a loss of tokens, such as vanilla"
            )
        correction = self.config.algorithm.rollout_correction
        by_rows = correction.rollout_is == "sequence" or str(correction.rollout_rs or "").startswith("seq")
        if rows > rollouts and correction.bypass_mode and by_rows:
            raise ConfigError(
                f"algorithm.rollout_correction judges sequences in bypass mode by row, and {rollouts} "
                f"rollouts have {rows} rows: set bypass_mode to False, or choose token levels"
            )
        mode = actor.loss_agg_mode
        if rows > rollouts and mode not in ("token-mean", "token-sum"):
            raise ConfigError(
                f"actor_rollout_ref.actor.loss_agg_mode={mode} weighs rows, and {rollouts} rollouts have "
                f"{rows} "
                "rows: "
                "use token-mean, under which splitting a rollout changes nothing"
            )

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        correction = self.config.algorithm.rollout_correction
        bypass = bool(correction.bypass_mode)
        correction.bypass_mode = False
        try:
            # In bypass mode too: the recomputation is what proves the tokens.
            result = self._recompute(batch, metrics)
        finally:
            correction.bypass_mode = bypass
        self._await_claim()
        self._prove_tokens(batch, metrics)
        return super()._compute_old_log_prob(batch, metrics) if bypass else result

    @phase("recomputing logprobs", "compute")
    def _recompute(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self.parameter_sync_step > 1:
            return super()._compute_old_log_prob(batch, metrics)
        # With one update a step there is no older policy to come back to, and no copy of all weights to be
        # made.
        return PPOTrainer._compute_old_log_prob(self, batch, metrics)

    @phase("computing the reference's logprobs", "compute")
    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        return super()._compute_ref_log_prob(batch, metrics)

    @phase("computing values", "compute")
    def _compute_values(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        return super()._compute_values(batch, metrics)

    @phase("computing advantages", "compute")
    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        ours: dict[str, Any] = {"compute_rollout_correction_and_add_to_batch": correct_over_rollouts}
        if self.config.algorithm.adv_estimator == TURNS:
            ours["compute_advantage_for_multi_trajectories"] = self._credit_turns
        if self.learns_best:
            ours["compute_advantage_for_multi_trajectories"] = self.choose_best
        with patch.multiple(trainer_base, **ours):
            result = super()._compute_advantage(batch, metrics)
        if self.learns_best:
            self.mask_others(batch)
        rejected = metrics.pop("tokens/rejected", 0.0)
        if rejected:
            self._counts.update({"tokens/dropped/rejected": rejected, "tokens/dropped": rejected})
            self._counts.subtract({"tokens/trained": rejected})
        return result

    def _credit_turns(self, data: Any, batch_keys: list[str], **_options: Any) -> Any:
        """Stands where verl computes advantages: every answer's own, from the returns of turns."""
        (names,) = texts(self.hooks.queue, batch_keys, "train", "rollout_id")
        labels = data.non_tensor_batch["uid"].tolist()
        by_std = bool(self.config.algorithm.get("norm_adv_by_std_in_grpo", True))
        mask = data.batch["response_mask"]
        found = credit_turns(labels, names, mask, self.agent_loop_manager.rollout, by_deviation=by_std)
        data.batch["advantages"] = data.batch["returns"] = found
        return data

    @phase("updating the actor", "compute")
    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """One optimiser step per epoch over whole rollouts, however many rows they have."""
        self._prove_seals(batch, metrics)
        actor = self.config.actor_rollout_ref.actor
        real_rows = len(real_keys(batch))
        learned = self.rows_of_best(batch) if self.learns_best else batch
        if learned is None:
            return batch
        learned.extra_info.update(
            {
                "calculate_entropy": bool(actor.calculate_entropy or actor.entropy_coeff != 0.0),
                "distillation_use_topk": False,
                "distillation_only": False,
                "global_batch_size": real_rows,
                "num_mini_batch": 1,
                "epochs": actor.ppo_epochs,
                "seed": actor.data_loader_seed,
                "dataloader_kwargs": {"shuffle": actor.shuffle},
                "temperature": self._loss_temperature,
            }
        )
        # One optimiser step at the end of one epoch: until then the parameters are what they were.
        self._updating = self._updating or self.local_trigger_step > 0 or actor.ppo_epochs > 1
        output = rename_dict(self.actor_rollout_wg.update_actor(learned)["metrics"], "actor/")
        output["perf/mfu/actor"] = output.pop("actor/mfu")
        self._updating = True
        self._counts["loss/skipped_updates"] += unfinished(output.get("actor/grad_norm", ()))
        metrics.update(reduce_metrics(output))
        return batch

    @property
    def _loss_temperature(self) -> float:
        sampled = self.config.actor_rollout_ref.rollout.temperature
        return TEMPERATURE if self.learns_best else float(sampled)

    @phase("updating the critic", "compute")
    def _update_critic(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        critic = self.config.critic
        batch.extra_info.update(
            {
                "global_batch_size": len(real_keys(batch)),
                "num_mini_batch": 1,
                "epochs": critic.ppo_epochs,
                "seed": critic.data_loader_seed,
                "dataloader_kwargs": {"shuffle": critic.shuffle},
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            }
        )
        # The critic's step comes before the actor's: after it, the state of the step before is gone.
        self._updating = True
        output = rename_dict(self.critic_wg.train_mini_batch(batch).get()["metrics"], "critic/")
        output["perf/mfu/critic"] = output.pop("critic/mfu")
        self._counts["loss/skipped_updates"] += unfinished(output.get("critic/grad_norm", ()))
        metrics.update(reduce_metrics(output))
        return batch

    @phase("saving a checkpoint", "save")
    def _save_checkpoint(self) -> None:
        self.hooks.checkpoints.save(self)
        self._saved_step = self.global_steps

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.config.trainer.resume_mode == "resume_path":
            state = LearnerState.read(Path(self.config.trainer.resume_from_path))
            self.prompts_fetched = state.prompts_fetched
            self._left_over.extend((place, index) for place, index in state.outstanding)

    def _validate(self) -> dict[str, float]:
        metrics: dict[str, float]
        if self.hooks.validation is None:
            metrics = super()._validate()
        else:
            items = (self.val_dataset[number] for number in range(len(self.val_dataset)))
            tasks = (orjson.loads(item["task"]) for item in items)
            metrics, keep = self.hooks.validation.run(self.global_steps, tasks)
            if keep and self.config.trainer.save_freq > 0 and self._saved_step != self.global_steps:
                self._save_checkpoint()
        if not self.config.trainer.val_only and self.global_steps == 0:
            self.hooks.on_metrics(0, _numbers(metrics))
        return metrics

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: Any, **kwargs: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **kwargs)
        metrics.update(self.agent_loop_manager.drain_counts())
        metrics.update(self._counts)
        if self.order is not None:
            metrics.update(self.order.curriculum.metrics())
        metrics["idle/optimiser_seconds"] = metrics.get("timing_s/gen", 0.0)
        trained = [
            self.agent_loop_manager.rollout(entry.rollout_id)
            for claimed in self._claimed_in_step
            for entry in claimed.entries
        ]
        metrics.update(batch_metrics(trained))
        self.hooks.on_rollouts(self.global_steps, trained)
        for claimed in self._claimed_in_step:
            self.agent_loop_manager.forget([entry.rollout_id for entry in claimed.entries])
        stop = self.hooks.on_metrics(self.global_steps, _numbers(metrics))
        # After the report: a step that counts as trained has its place in the curve, whenever this one ends.
        self.hooks.checkpoints.commit(self)
        if stop:
            # Somebody asked to stop: this step is the last one, and nothing trained is lost.
            if self.uncommitted:
                self._save_checkpoint()
                self.hooks.checkpoints.commit(self)
            self.total_training_steps = self.global_steps

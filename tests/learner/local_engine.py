"""An engine without a server: the policy in this process, sampled with torch, weights by the real transfer.

It stands where store, runners and vLLM stand, so that the trainer can be tried alone: every rollout is
sampled from the weights of the policy version that was published last, with the logprobs of that sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from agl_grpc.learner.rollouts.groups import (
    BatchEntry,
    ClaimedBatch,
    Deliver,
    FinishedGroup,
    FinishedRollout,
    GroupRequest,
    Row,
)
from agl_grpc.learner.verl.sender import SEND_MODE
from agl_grpc.sample import AttemptFacts, Verdict
from agl_grpc.weights.adapters import is_adapter, merged
from agl_grpc.weights.receiver import WeightReceiver
from agl_grpc.weights.wire import ReceiverState

TARGET = 10
"""Tokens below this id are rewarded: the share of them is the reward."""
RESPONSE_LENGTH = 8
TURNS = ((0, 3), (3, 8))
"""Two answers a row: the return of each counts the rewarded tokens from its beginning on."""
NAMED = "judged"
"""A reward beside the one that counts: the same, but for tasks that are told to have it flat."""


Change = Callable[[list[FinishedGroup]], list[FinishedGroup]]


class LocalEngine:
    """``RolloutSource`` and ``WeightPublication`` in one: samples, judges, receives weights.

    ``change`` may spoil finished groups before they are delivered, ``changes`` those of the first steps;
    ``repeat`` makes every batch alike.
    ``recorded`` are groups by their uid: they are delivered instead of sampled ones. ``flat_every`` gives
    each rollout of every such task the same ``NAMED`` reward.
    """

    def __init__(
        self,
        model_path: str,
        *,
        seed: int,
        repeat: bool = False,
        change: Change | None = None,
        recorded: Mapping[str, FinishedGroup] | None = None,
        flat_every: int = 0,
    ):
        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self._base = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._generator = torch.Generator().manual_seed(seed)
        self._receiver = WeightReceiver("local")
        self.change = change
        self.changes: list[Change | None] = []
        self._seed = seed if repeat else None
        self._recorded = recorded
        self._flat_every = flat_every
        self.record: dict[str, FinishedGroup] = {}
        self.digests: dict[int, set[str]] = {}
        # Weights by version, for those who keep them.
        self.history: dict[int, dict[str, torch.Tensor]] = {}
        self.keeps_history = False
        self.on_claim: Callable[[int, list[str]], None] = lambda _step, _groups: None
        self.on_published: Callable[[int, str], None] = lambda _step, _digest: None
        self._entries: dict[str, BatchEntry] = {}
        self._actors: Any = None
        self.version = 0
        self.deliver: Deliver | None = None
        self.rewards: list[float] = []
        self.batches: list[ClaimedBatch] = []

    def submit(self, groups: list[GroupRequest]) -> None:
        assert self.deliver is not None
        finished: list[FinishedGroup] = []
        if self._seed is not None:
            self._generator.manual_seed(self._seed)
        for request in groups:
            known = self._recorded[request.uid] if self._recorded is not None else None
            rollouts = list(known.rollouts) if known else self._sample(request)
            for rollout in rollouts:
                assert rollout.reward is not None
                self._entries[rollout.rollout_id] = BatchEntry(
                    rollout.rollout_id, request.uid, rollout.reward
                )
                self.rewards.append(rollout.reward)
            # A recorded group is as old as when it was first asked for.
            finished.append(known or FinishedGroup(request, tuple(rollouts)))
            self.record[request.uid] = finished[-1]
        step = groups[0].step
        change = self.changes[step - 1] if 0 < step <= len(self.changes) else self.change
        for group in change(finished) if change else finished:
            self.deliver(group)

    def claim(self, step: int, rollout_ids: list[str]) -> ClaimedBatch:
        entries = tuple(self._entries.pop(rollout_id) for rollout_id in rollout_ids)
        self.batches.append(ClaimedBatch(f"batch-{step}", f"hash-{step}", entries))
        self.on_claim(step, list(dict.fromkeys(entry.group_id for entry in entries)))
        return self.batches[-1]

    def describe(self, uids: list[str]) -> str:
        return f"open groups: {', '.join(uids)}"

    def bind(self, actors: Any) -> None:
        self._actors = actors

    def update_weights(self, step: int) -> dict[str, float]:
        import ray

        transfer = f"{time.monotonic_ns()}/{step}"
        ranks = int(self._actors.world_size)
        prepared = ray.get(self._actors.execute_checkpoint_engine(method=["prepare"] * ranks))
        setup = {"transfer_id": [transfer] * ranks, "receivers": [1] * ranks, "timeout": [30.0] * ranks}
        ray.get(self._actors.execute_checkpoint_engine(method=["init_process_group"] * ranks, **setup))
        endpoint = prepared[0]["endpoint"]
        self._receiver.prepare(transfer, endpoint, 30.0)
        report = ray.get(self._actors.update_weights(global_steps=step, mode=SEND_MODE))[0]
        while self._receiver.status().state is ReceiverState.RECEIVING:
            time.sleep(0.001)
        assert self._receiver.status().digest == report["digest"], self._receiver.status()
        staged = self._receiver.staged(transfer)
        weights = merged(self._base.items(), staged) if is_adapter(staged) else staged
        self._model.load_state_dict(dict(weights), strict=True)
        self.version = step
        self.digests.setdefault(step, set()).add(str(report["digest"]))
        if self.keeps_history:
            self.history[step] = self.weights
        self.on_published(step, str(report["digest"]))
        return {"weights/bytes": float(report["sent_bytes"])}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that were published last."""
        return {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    @torch.no_grad()
    def _sample(self, request: GroupRequest) -> list[FinishedRollout]:
        variant = request.index % 3 if self._seed is None else 0
        prompt = torch.tensor([[1, 5, 6, 7 + variant]]).repeat(request.size, 1)
        sequence = prompt
        logprobs = []
        for _ in range(RESPONSE_LENGTH):
            distribution = torch.log_softmax(self._model(sequence).logits[:, -1].float(), dim=-1)
            token = torch.multinomial(distribution.exp(), 1, generator=self._generator)
            logprobs.append(distribution.gather(1, token))
            sequence = torch.cat([sequence, token], dim=1)
        responses, sampled = sequence[:, prompt.shape[1] :], torch.cat(logprobs, dim=1)
        rewards = (responses < TARGET).float().mean(dim=1)
        flat = bool(self._flat_every) and request.index % self._flat_every == 0
        named = torch.full_like(rewards, 0.5) if flat else rewards
        return [
            FinishedRollout(
                rollout_id=request.rollout_id(number),
                group_id=request.uid,
                reward=float(rewards[number]),
                rows=(self._row(prompt[number], responses[number], sampled[number]),),
                captured=RESPONSE_LENGTH,
                facts=AttemptFacts(verdicts=(Verdict("judge", NAMED, float(named[number])),)),
            )
            for number in range(request.size)
        ]

    def _row(self, prompt: torch.Tensor, response: torch.Tensor, logprobs: torch.Tensor) -> Row:
        return Row(
            prompt_ids=prompt.numpy(),
            response_ids=response.numpy(),
            response_mask=np.ones(RESPONSE_LENGTH, dtype=np.int64),
            logprobs=logprobs.numpy(),
            policy_versions=np.full(RESPONSE_LENGTH, self.version, dtype=np.int64),
            turns=tuple(
                (start, end, float((response[start:] < TARGET).float().sum())) for start, end in TURNS
            ),
        )

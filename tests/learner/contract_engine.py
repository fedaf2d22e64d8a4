"""Engine and worker in one process, over the contract alone; sampled with torch instead of vLLM.

It takes policy versions as an engine does, leases rollouts as a worker does, answers each with two model
calls (the second continues the first after an observation), and rewards it, unless its task is ``unjudged``.
Runs until it is told to stop.

Arguments: store address, run ids (with commas between them), model folder, model name; a second name makes a
second engine, whose model answers the second call of each rollout. Each run has engines and a worker of its
own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from agl_grpc.client import LeaseLost, StoreClient
from agl_grpc.client.leases import Completion, LeasedRollout
from agl_grpc.model.enums import EnginePhase, PolicyVersionStatus
from agl_grpc.model.policy import Engine, EngineState, PolicyVersion
from agl_grpc.model.reward import Reward
from agl_grpc.model.rollout import SEED_LABEL
from agl_grpc.model.value import to_payload
from agl_grpc.v1 import model_call_pb2, span_pb2
from agl_grpc.weights.receiver import WeightReceiver
from agl_grpc.weights.wire import ReceiverState, ReceiverStatus

TARGET = 10
"""Tokens below this id are rewarded: the share of them is the reward."""
TURN = 4
OBSERVATION = [60, 61]


class ContractEngine:
    """One engine of a run and one worker of its queue; ``second`` answers second calls (None = itself)."""

    def __init__(
        self,
        client: StoreClient,
        model_path: str,
        model_name: str,
        second: ContractEngine | None = None,
    ) -> None:
        self._second = second or self
        self._client = client
        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self._generator = torch.Generator().manual_seed(0)
        self._receiver = WeightReceiver(f"contract-{model_name}")
        engine_id = f"contract-{client.run_id}-{model_name}-{os.getpid()}"
        self._engine = Engine(engine_id=engine_id, run_id=client.run_id, model=model_name)
        self._worker_id = f"worker-{client.run_id}"
        self._staged: dict[int, str] = {}

    async def run(self) -> None:
        """Serves for ever."""
        parts = [self.serve(), self._work()]
        await asyncio.gather(*parts, *([self._second.serve()] if self._second is not self else []))

    async def serve(self) -> None:
        """Takes policy versions for ever."""
        await self._client.report_engine_state(self._engine)
        await self._follow_versions()

    async def _follow_versions(self) -> None:
        changes = self._client.watch_policy_versions(
            self._engine.model, engine_id=self._engine.engine_id, include_existing=True
        )
        async for change in changes:
            for version in change.items:
                await self._take(version)

    async def _take(self, version: PolicyVersion) -> None:
        number, transfer = version.policy_version, version.source.group_id
        if number <= self._engine.active_policy_version:
            return
        if version.status is PolicyVersionStatus.PREPARING and number not in self._staged:
            self._staged[number] = ""
            self._receiver.prepare(transfer, version.source.rendezvous, 30.0)
            status = await asyncio.to_thread(self._received)
            self._staged[number] = status.digest
            phase = EnginePhase.RECEIVED if status.state is ReceiverState.RECEIVED else EnginePhase.FAILED
            await self._report(number, phase, status.digest, status.error)
        elif version.status is PolicyVersionStatus.COMMITTED and self._staged.get(number):
            started = time.monotonic_ns()
            assert version.weights_digest == self._staged[number]
            self._model.load_state_dict(dict(self._receiver.staged(transfer)), strict=True)
            self._engine.active_policy_version = number
            await self._report(number, EnginePhase.ACTIVE, pause_ns=time.monotonic_ns() - started)

    def _received(self) -> ReceiverStatus:
        """The end of the transfer under way; it ends by its own deadline at the latest."""
        while (status := self._receiver.status()).state is ReceiverState.RECEIVING:
            time.sleep(0.002)
        return status

    async def _report(
        self, number: int, phase: EnginePhase, digest: str = "", error: str = "", pause_ns: int = 0
    ) -> None:
        state = EngineState(
            engine_id=self._engine.engine_id,
            policy_version=number,
            phase=phase,
            weights_digest=digest,
            error=error,
            pause_ns=pause_ns,
        )
        await self._client.report_engine_state(self._engine, state)

    async def _work(self) -> None:
        while True:
            session = f"session-{self._client.run_id}-{os.getpid()}"
            leased = await self._client.lease_rollouts(self._worker_id, session, limit=64, wait=10.0)
            if leased:
                await self._answer(leased)

    async def _answer(self, leased: list[LeasedRollout]) -> None:
        """All leased rollouts in one batch of sequences: the prompt depends on the task."""
        first = torch.tensor([[1, 5, 6, 7 + int(each.rollout.input["n"]) % 3] for each in leased])
        labels = [each.rollout.labels.get(SEED_LABEL) for each in leased]
        seeds = [int(label) for label in labels if label is not None]
        version = self._engine.active_policy_version
        one, one_logprobs = self._sample(first, seeds)
        observed = torch.tensor([OBSERVATION] * len(leased))
        second = torch.cat([first, one, observed], dim=1)
        other = self._second
        other_version = other._engine.active_policy_version
        two, two_logprobs = other._sample(second, [seed + 1 for seed in seeds])
        groups, completions = [], []
        for place, each in enumerate(leased):
            # The tool fails for even tasks, whose answers are malformed too.
            odd = bool(int(each.rollout.input["n"]) % 2)
            calls = [
                self._call(first[place], one[place], one_logprobs[place], version),
                other._call(second[place], two[place], two_logprobs[place], other_version),
            ]
            request = _request(first[place].tolist(), one[place].tolist(), failed=not odd)
            calls[1].model_call.raw_request.CopyFrom(to_payload(request, "raw_request"))
            groups.append(
                span_pb2.AttemptSpans(
                    rollout_id=each.rollout.rollout_id, attempt_id=each.attempt_id, spans=calls
                )
            )
            share = float((torch.cat([one[place], two[place]]) < TARGET).float().mean())
            owner = {"rollout_id": each.rollout.rollout_id, "attempt_id": each.attempt_id}
            rewards = [Reward(**owner, value=share), Reward(**owner, name="format", value=float(odd))]
            given = [] if each.rollout.input.get("unjudged") else rewards
            completions.append(Completion(lease=each.lease, rewards=given))
        stored = await self._client.append_spans(groups)
        assert not stored.rejected, stored.rejected[0]
        for result in await self._client.complete_attempts(self._worker_id, completions):
            # A learner that takes over from one that was killed cancels what it cannot use.
            if isinstance(result, Exception) and not isinstance(result, LeaseLost):
                raise result

    def _sample(self, sequences: torch.Tensor, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers and logprobs; with seeds each sequence is alone: what else was leased changes nothing."""
        if not seeds:
            return self._draw(sequences, self._generator)
        drawn = [
            self._draw(sequence[None], torch.Generator().manual_seed(seed))
            for sequence, seed in zip(sequences, seeds, strict=True)
        ]
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    @torch.no_grad()
    def _draw(self, sequence: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        start, logprobs = sequence.shape[1], []
        for _ in range(TURN):
            distribution = torch.log_softmax(self._model(sequence).logits[:, -1].float(), dim=-1)
            token = torch.multinomial(distribution.exp(), 1, generator=generator)
            logprobs.append(distribution.gather(1, token))
            sequence = torch.cat([sequence, token], dim=1)
        return sequence[:, start:], torch.cat(logprobs, dim=1)

    def _call(
        self, prompt: torch.Tensor, response: torch.Tensor, logprobs: torch.Tensor, version: int
    ) -> span_pb2.Span:
        now = time.time_ns()
        return span_pb2.Span(
            trace_id=os.urandom(16),
            span_id=os.urandom(8),
            name="chat",
            start_time_unix_nano=now,
            end_time_unix_nano=now,
            model_call=model_call_pb2.ModelCall(
                model=self._engine.model,
                prompt=model_call_pb2.PromptTokens(token_ids=prompt.tolist()),
                choices=[
                    model_call_pb2.Choice(
                        token_ids=response.tolist(),
                        logprobs=logprobs.tolist(),
                        finish_reason="stop",
                        policy_runs=[
                            model_call_pb2.PolicyRun(start=0, end=len(response), policy_version=version)
                        ],
                    )
                ],
                sampling=model_call_pb2.SamplingParameters(temperature=1.0),
                logprob_semantics=model_call_pb2.LOGPROB_SEMANTICS_PROCESSED,
                outcome=model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE,
                engine_id=self._engine.engine_id,
                mode="train",
            ),
        )


def _request(prompt: list[int], answer: list[int], *, failed: bool) -> dict[str, Any]:
    """The second call as the agent had asked it: with what its tool said in between."""

    def text(ids: list[int]) -> str:
        return " ".join(f"t{token}" for token in ids)

    said = "Error: " if failed else ""
    return {
        "messages": [
            {"role": "user", "content": text(prompt)},
            {"role": "assistant", "content": text(answer)},
            {"role": "tool", "tool_call_id": "tool-1", "content": said + text(OBSERVATION)},
        ]
    }


async def serve_run(store: str, run_id: str, model_path: str, names: list[str]) -> None:
    """Engines and worker of one run."""
    async with StoreClient(store, run_id=run_id) as client:
        second = ContractEngine(client, model_path, names[1]) if len(names) > 1 else None
        await ContractEngine(client, model_path, names[0], second).run()


async def main() -> None:
    store, run_ids, model_path, *names = sys.argv[1:]
    await asyncio.gather(*(serve_run(store, run_id, model_path, names) for run_id in run_ids.split(",")))


if __name__ == "__main__":
    asyncio.run(main())

"""verl starts vLLM itself, with our interceptor inside, and `Trainer.fit` trains through it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.model.enums import BatchStatus, PolicyVersionStatus, RolloutMode, TrainingRunStatus
from agl_grpc.model.policy import Engine, PolicyVersion
from agl_grpc.model.reading import get_message_value
from agl_grpc.model.training import Batch
from agl_grpc.trainer import FitResult
from agl_grpc.v1 import span_pb2
from tests.learner.hybrid_run import GROUP_SIZE, GROUPS, MODEL, RUN, agent, tasks, trainer
from tests.support.environments import REPOSITORY, engine_environment, hybrid_python
from tests.support.store_process import StoreProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SEED, STEPS, VALIDATED = 7, 3, 4


@dataclass(frozen=True)
class Stored:
    """What the run left in its store: of every rollout its one model call, and the tokens its agent saw."""

    result: FitResult
    engines: Sequence[Engine]
    versions: Sequence[PolicyVersion]
    batches: Sequence[Batch]
    calls: Mapping[str, span_pb2.StoredSpan]
    told: Mapping[str, Mapping[str, list[int]]]
    modes: Mapping[str, RolloutMode]

    def engines_of(self, mode: RolloutMode) -> list[str]:
        """Which engines answered rollouts of a mode, in the order of the calls."""
        found = [call for each, call in self.calls.items() if self.modes[each] is mode]
        found.sort(key=lambda call: call.span.start_time_unix_nano)
        return list(dict.fromkeys(call.span.model_call.engine_id for call in found))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    print(f"seed {SEED}")
    folder = tmp_path_factory.mktemp("runs")
    make = [hybrid_python(), "-m", "tests.support.tiny_model", str(folder / "model")]
    subprocess.run(make, env=engine_environment(), cwd=REPOSITORY, check=True, timeout=300)
    asked = tasks(STEPS)
    result = trainer(folder, folder / "model", STEPS, SEED, save_every=STEPS).fit(
        agent, asked, val_dataset=asked[:VALIDATED]
    )
    return asyncio.run(_read(result))


async def _read(result: FitResult) -> Stored:
    assert result.training_run is not None
    with StoreProcess(result.folder.database) as store:
        async with StoreClient(store.address, run_id=RUN) as client:
            rollouts = await client.query_rollouts()
            calls = {call.rollout_id: call async for call in client.export_spans(model_calls_only=True)}
            told = {}
            for rollout in rollouts:
                spans = await client.query_spans(rollout.rollout_id)
                (text,) = filter(None, map(get_message_value, spans))
                told[rollout.rollout_id] = orjson.loads(text)
            return Stored(
                result=result,
                engines=await client.query_engines(MODEL),
                versions=await client.query_policy_versions(MODEL),
                batches=await client.query_batches(result.training_run.training_run_id),
                calls=calls,
                told=told,
                modes={rollout.rollout_id: rollout.mode for rollout in rollouts},
            )


def test_the_run_succeeds_and_every_rollout_has_its_call(stored: Stored) -> None:
    assert stored.result.training_run is not None
    assert stored.result.training_run.status is TrainingRunStatus.SUCCEEDED
    assert stored.result.failed == stored.result.unfinished == 0
    assert stored.calls.keys() == stored.told.keys()
    assert len(stored.calls) == STEPS * GROUPS * GROUP_SIZE + 2 * VALIDATED


def test_vllm_that_verl_started_answers_all_that_is_trained_and_another_one_what_comes_after(
    stored: Stored,
) -> None:
    (trained,) = stored.engines_of(RolloutMode.TRAIN)
    before, after = stored.engines_of(RolloutMode.VAL)
    assert trained == before
    assert trained.startswith(f"{RUN}-verl-0-")
    assert {engine.engine_id for engine in stored.engines} == {trained, after}
    for engine in stored.engines:
        assert engine.engine_version.startswith("vllm ")
        assert engine.endpoint.startswith("http://127.0.0.1:")


def test_captured_tokens_are_those_that_the_agent_was_told_of(stored: Stored) -> None:
    for rollout, call in stored.calls.items():
        (choice,) = call.span.model_call.choices
        captured = {"prompt": [*call.span.model_call.prompt.token_ids], "sampled": [*choice.token_ids]}
        assert captured == stored.told[rollout]
        assert len(choice.logprobs) == len(choice.token_ids) > 0


def test_every_token_of_a_step_is_of_the_weights_before_it(stored: Stored) -> None:
    assert [(batch.step, batch.status) for batch in stored.batches] == [
        (step, BatchStatus.COMMITTED) for step in range(1, STEPS + 1)
    ]
    for batch in stored.batches:
        assert len(batch.entries) == GROUPS * GROUP_SIZE
        for entry in batch.entries:
            (choice,) = stored.calls[entry.rollout_id].span.model_call.choices
            runs = [(run.policy_version, run.start, run.end) for run in choice.policy_runs]
            assert runs == [(batch.step - 1, 0, len(choice.token_ids))]
    last = [call for each, call in stored.calls.items() if stored.modes[each] is RolloutMode.VAL]
    versions = {run.policy_version for call in last for run in call.span.model_call.choices[0].policy_runs}
    assert versions == {0, STEPS}


def test_every_step_trains_proven_tokens_and_changes_the_weights_that_the_engine_serves(
    stored: Stored,
) -> None:
    steps = [item.metrics for item in stored.result.history]
    assert len(steps) == STEPS
    for step in steps:
        assert step["tokens/trained"] == step["check/logprob_tokens_compared"] > 0
        assert step["check/logprob_max_difference"] < 1e-4
        assert step["loss/gradient_norm"] > 0
    assert {item.status for item in stored.versions} == {PolicyVersionStatus.COMMITTED}
    assert {item.policy_version for item in stored.versions} == set(range(1, STEPS + 1))
    assert len({item.weights_digest for item in stored.versions}) == STEPS


def test_the_last_checkpoint_is_validated_though_the_engine_has_ended_with_the_learner(
    stored: Stored,
) -> None:
    result = stored.result
    assert [len(scores["sampled"].tasks) for scores in (result.before, result.after)] == [VALIDATED] * 2
    assert result.checkpoint is not None
    assert result.checkpoint.name == f"global_step_{STEPS}"

"""Trainers that are killed, spread over nodes, starved, hung, and compared with verl alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.environments import learner_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

SAME = ("actor/pg_loss", "actor/grad_norm", "reward/mean", "tokens/trained", "check/logprob_max_difference")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of this module, made once: a Ray session takes long to start."""
    repository = Path(__file__).parents[2]
    folder = tmp_path_factory.mktemp("lives")
    done = subprocess.run(
        [learner_python(), "-m", "tests.learner.lives_script", str(folder)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _curve(steps: list[dict[str, float]]) -> dict[int, list[float]]:
    return {int(step["step"]): [step[name] for name in SAME] for step in steps}


def test_a_trainer_killed_anywhere_repeats_the_undisturbed_run_bit_for_bit(outcomes: dict[str, Any]) -> None:
    """Loss curve and weights, whether a step was trained once or again after a kill; one batch ahead."""
    killed, whole = outcomes["killed"], outcomes["undisturbed"]
    # Eight processes ended by SIGKILL, each where it was meant to; the ninth came to its end.
    assert killed["ends"] == [-signal.SIGKILL] * 8 + [0]
    assert killed["points"] == [
        "claimed",
        "proven",
        "saving",
        "saved",
        "reported",
        "committed",
        "updated",
        "published",
    ]
    expected = _curve(whole["steps"])
    reached = set()
    for life in killed["steps"]:
        for step, values in _curve(life).items():
            assert values == expected[step], f"step {step}"
            reached.add(step)
    assert reached == set(expected) == set(range(1, 9))
    # One set of weights for every version that any of the trainers published.
    assert {int(step) for step in killed["digests"]} >= set(range(1, 9))
    for step, digests in killed["digests"].items():
        assert digests == whole["digests"][step], f"version {step}"


def test_rollouts_of_older_weights_are_carried_over_a_kill(outcomes: dict[str, Any]) -> None:
    """From the second step on, all tokens are a version old, in every life."""
    for life in [outcomes["undisturbed"]["steps"], *outcomes["killed"]["steps"]]:
        for step in life:
            ages = {name: count for name, count in step.items() if name.startswith("staleness/tokens/")}
            assert ages == {f"staleness/tokens/{min(1, step['step'] - 1):.0f}": step["tokens/trained"]}


def test_each_batch_is_committed_once_whatever_was_killed(outcomes: dict[str, Any]) -> None:
    killed = outcomes["killed"]
    assert killed["committed"] == [f"batch-{step}" for step in range(1, 9)]
    # What was claimed and not committed was released: one claim of every step is left.
    assert killed["claims"] == {str(step): 1 for step in range(1, 9)}
    # The kills say how often a step was claimed; its batch was always the same, and no group is in two.
    manifests: dict[int, list[list[str]]] = {}
    for step, groups in killed["manifests"]:
        manifests.setdefault(step, []).append(groups)
    assert [len(manifests[step]) for step in range(1, 9)] == [4, 3, 3, 3, 2, 1, 2, 1]
    assert all(each == found[0] for found in manifests.values() for each in found)
    trained = [group for found in manifests.values() for group in found[0]]
    assert len(trained) == len(set(trained)) == 8 * 8


def test_two_ranks_on_two_nodes_give_the_same_losses_and_weights_as_one(outcomes: dict[str, Any]) -> None:
    fidelity = outcomes["fidelity"]
    alone, apart = fidelity["ranks"]
    assert (len(alone), len(apart)) == (1, 2)
    assert len({node for node, _ in apart}) == 2
    assert {backend for _, backend in apart} == {"gloo"}
    one, two = fidelity["steps"]
    assert [step["step"] for step in two] == [1, 2, 3]
    for mine, theirs in zip(two, one, strict=True):
        assert mine["actor/pg_loss"] == pytest.approx(theirs["actor/pg_loss"], abs=1e-5)
        assert mine["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=1e-3)
        assert mine["tokens/trained"] == theirs["tokens/trained"]
    assert fidelity["last_weights_of_two_ranks"] < 1e-4


def test_one_update_is_verls_own_and_that_of_two_ranks(outcomes: dict[str, Any]) -> None:
    """Advantages, loss and gradients of the same rollouts: through our trainer, and by verl alone."""
    fidelity = outcomes["fidelity"]
    assert fidelity["errors"] == ["", ""]
    assert fidelity["rows"] == [64, 64]
    assert fidelity["advantages"] <= 1e-6
    ours, two, alone = fidelity["losses"]
    assert abs(ours - alone) <= 1e-6
    assert abs(ours - two) <= 1e-6
    assert fidelity["gradients"] <= 1e-5
    assert fidelity["gradients_of_two_ranks"] <= 1e-5
    norms = fidelity["gradient_norms"]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_23_splitting_a_rollout_into_rows_changes_no_gradient(outcomes: dict[str, Any]) -> None:
    """1, 2 and 5 rows a rollout: one update each, and every parameter's gradient is the same."""
    split = outcomes["fidelity"]["split"]
    assert [split[parts][0] for parts in ("1", "2", "5")] == [64, 128, 320]
    for _, updates, difference in split.values():
        assert updates == 1
        assert difference <= 1e-5
    assert outcomes["fidelity"]["split_from_verl"] <= 1e-5


def test_every_policy_loss_of_verl_gets_from_our_rows_what_it_gets_from_verls(
    outcomes: dict[str, Any],
) -> None:
    found = outcomes["fidelity"]["policy_losses"]
    assert len(found) == 11
    for name, (loss, norm, our_loss, our_norm) in found.items():
        assert abs(our_loss - loss) <= 1e-6, name
        assert our_norm == pytest.approx(norm, rel=1e-5), name
        assert norm > 1e-3, name
    # They are losses of their own.
    assert len({round(loss, 6) for loss, *_ in found.values()}) >= 8


def test_tokens_of_older_weights_are_corrected(outcomes: dict[str, Any]) -> None:
    """Sequence weights, truncated, in the asynchronous steps; with a reference and an entropy bonus."""
    outcome = outcomes["corrected"]
    assert outcome["error"] == ""
    steps = outcome["steps"]
    assert steps[0]["rollout_corr/rollout_is_max"] == pytest.approx(1.0, abs=1e-3)
    later = steps[2:]
    assert min(step["staleness/tokens/1"] for step in later) > 0
    for step in later:
        assert step["rollout_corr/rollout_is_std"] > 1e-3
        assert step["rollout_corr/rollout_is_seq_max"] <= 1.5
        assert step["rollout_corr/kl"] > 0
        ages = sum(count for name, count in step.items() if name.startswith("staleness/tokens/"))
        assert ages == step["tokens/trained"]
    assert steps[-1]["actor/kl_loss"] > 0
    assert all(step["actor/entropy_loss"] > 0 for step in steps)


def test_groups_without_variance_in_a_named_reward_are_dropped_and_refilled(outcomes: dict[str, Any]) -> None:
    """The named grader judges a quarter of the tasks alike: none of them is trained, batches are full."""
    outcome = outcomes["corrected"]
    assert {step["training/rollouts"] for step in outcome["steps"]} == {32}
    dropped = [step.get("training/filter_groups/evicted_samples", 0) for step in outcome["steps"]]
    assert sum(dropped) > 0
    assert outcome["tasks"]
    assert [task for task in outcome["tasks"] if task % 4 == 0] == []
    # Neither what was trained nor what was dropped is kept in memory.
    assert outcome["not_forgotten"] == []


def test_groups_are_not_filtered_by_a_reward_that_nobody_gives(outcomes: dict[str, Any]) -> None:
    error = outcomes["corrected"]["unknown"]
    assert error.startswith("ConfigError: algorithm.filter_groups.metric is 'nobody', and not every rollout")
    assert "\n" not in error


def test_waiting_is_measured(outcomes: dict[str, Any]) -> None:
    steps = outcomes["undisturbed"]["steps"]
    for step in steps:
        assert 0 <= step["idle/optimiser_seconds"] <= step["timing_s/step"]
        assert step["idle/engine_seconds"] >= 0
    # They are before anything is asked for; later the batch ahead always is.
    assert steps[0]["idle/engine_seconds"] > 0


def test_out_of_memory_is_one_line_and_ends_with_a_checkpoint(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["bad"]
    error = outcome["errors"][0]
    assert error.startswith("MemoryExhaustedError: out of memory while updating the actor")
    assert "everything before step 3 is in a checkpoint" in error
    assert "\n" not in error
    assert outcome["counted"] == [[3, "out_of_memory"]]
    assert outcome["commits"] == [["global_step_2", ["batch-1", "batch-2"], 2]]
    assert outcome["steps"] == [1, 2]


def test_a_phase_that_hangs_ends_at_its_deadline_and_says_whom_it_waits_for(outcomes: dict[str, Any]) -> None:
    assert outcomes["bad"]["errors"][1] == (
        "DeadlineError: updating the actor took longer than 5 s (deadlines.compute); "
        "no answer from actor rank 0"
    )


def test_of_a_model_with_lora_only_the_adapter_travels_and_its_checkpoint_is_whole(
    outcomes: dict[str, Any],
) -> None:
    outcome = outcomes["lora"]
    assert outcome["error"] == ""
    sizes = {step["weights/bytes"] for step in outcome["steps"]}
    assert max(sizes) < min(step["weights/bytes"] for step in outcomes["undisturbed"]["steps"]) / 5
    # Every token is proven against the base and the adapter, which the engine has added up.
    assert max(step["check/logprob_max_difference"] for step in outcome["steps"]) < 1e-5
    # A trainer that goes on from it publishes the very adapter, and trains the next step on its tokens.
    resumed = outcome["resumed"]
    assert resumed["error"] == ""
    assert [step["step"] for step in resumed["steps"]] == [4]
    assert resumed["steps"][0]["check/logprob_max_difference"] < 1e-5
    assert resumed["digests"]["3"] == outcome["digests"]["3"]
    # What transformers loads, and what peft puts on the base, is what the engine served.
    assert outcome["learned"] > 1e-2
    assert max(outcome["differences"]) < 1e-5

"""The real verl trainer with our manager, sampler, sender and checkpoints, on a policy sampled in its own
process.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.environments import learner_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

Run = dict[str, Any]


def train(folder: Path, runs: list[Run]) -> list[dict[str, Any]]:
    """Runs the script in the learner environment; what each run did."""
    repository = Path(__file__).parents[2]
    command = [learner_python(), "-m", "tests.learner.trainer_script", str(folder), json.dumps(runs)]
    done = subprocess.run(
        command,
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcome: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of this module, made once: a Ray session takes half a minute to start."""
    folder = tmp_path_factory.mktemp("learner")
    ordered: Run = {
        "checkpoints": "ordered",
        "repeat": True,
        "curriculum": {"outside": 0.02, "solved_at": 0.3},
        "rollouts": "4 + 4 * (n % 2)",
    }
    runs: dict[str, Run] = {
        "learning": {
            "verl": {"trainer.total_training_steps": 16, "trainer.save_freq": 8},
            "mix_ups": ["shift", "rewards", "groups", "foreign", "masked"],
        },
        "resumed": {"verl": {"trainer.total_training_steps": 10}, "resume": "global_step_8"},
        "verls_queue": {"verl": {"trainer.total_training_steps": 3, "transfer_queue.enable": True}},
        "curriculum": {"verl": {"trainer.total_training_steps": 10, "trainer.save_freq": 8}, **ordered},
        "curriculum_resumed": {
            "verl": {"trainer.total_training_steps": 10},
            "resume": "global_step_8",
            **ordered,
        },
        "split": {
            "verl": {
                "trainer.total_training_steps": 7,
                "actor_rollout_ref.actor.optim.lr": 0.0,
                "trainer.save_freq": 7,
                # Shards of the ranks alone, nothing that transformers loads.
                "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra"],
            },
            "checkpoints": "split",
            "repeat": True,
            "changes": ["none", "split2", "split5", "none", "one_broke", "one_is_left", "unusable"],
        },
        "asynchronous": {
            "verl": {
                "trainer.total_training_steps": 5,
                "trainer.val_before_train": True,
                "trainer.test_freq": 2,
                "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
                "algorithm.adv_estimator": "rloo",
                "trainer.v1.separate_async.num_warmup_batches": 2,
                "trainer.v1.sampler.max_off_policy_threshold": 3,
            },
        },
        "turns": {
            "verl": {"trainer.total_training_steps": 8, "algorithm.adv_estimator": "grpo_turns"},
        },
        "best": {
            "verl": {"trainer.total_training_steps": 8},
            "best_of": {"keep": 2, "min_reward": 0.05},
            # Nothing is good enough from then on.
            "later": (6, {"keep": 2, "min_reward": 9.0}),
        },
        "stopped": {
            "verl": {
                "trainer.total_training_steps": 10,
                "algorithm.adv_estimator": "gae",
                "algorithm.rollout_correction.bypass_mode": True,
            },
            "stop_after": 2,
        },
    }
    results = dict(zip(runs, train(folder, list(runs.values())), strict=True))
    return {**results, "folder": folder}


def _column(outcome: dict[str, Any], name: str) -> list[float]:
    return [step[name] for step in outcome["steps"]]


def test_the_policy_learns_and_every_token_is_proven(outcomes: dict[str, Any]) -> None:
    learning = outcomes["learning"]
    assert learning["error"] == ""
    rewards = _column(learning, "reward/mean")
    assert rewards[0] < 0.25
    assert rewards[-1] > 0.55
    assert max(_column(learning, "check/logprob_max_difference")) < 1e-5
    assert min(_column(learning, "check/logprob_tokens_compared")) == 512
    assert max(_column(learning, "check/logprob_tokens_of_older_versions")) == 0


def test_rows_through_verls_transfer_queue_train_the_same_bit_for_bit(outcomes: dict[str, Any]) -> None:
    here, there = outcomes["learning"], outcomes["verls_queue"]
    assert there["error"] == ""
    for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "reward/mean", "check/sealed_rows"):
        assert _column(there, name) == _column(here, name)[:3]
    assert [there["digests"][step] for step in ("1", "2", "3")] == [
        here["digests"][step] for step in ("1", "2", "3")
    ]


def test_batches_are_committed_with_the_checkpoint_that_contains_them(outcomes: dict[str, Any]) -> None:
    commits = outcomes["learning"]["commits"]
    assert [name for name, _, _ in commits] == ["global_step_8", "global_step_16"]
    committed = [batch for _, batches, _ in commits for batch in batches]
    assert committed == [f"batch-{step}" for step in range(1, 17)]


def test_a_checkpoint_is_whole_or_absent_and_loads_with_transformers(outcomes: dict[str, Any]) -> None:
    folder = outcomes["folder"] / "checkpoints"
    assert not list(folder.glob(".unfinished-*"))
    model = folder / "global_step_16" / "actor" / "huggingface"
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "M.from_pretrained(sys.argv[1]); T.from_pretrained(sys.argv[1])"
    )
    subprocess.run([learner_python(), "-c", code, str(model)], check=True, timeout=120, capture_output=True)


def test_a_resumed_run_goes_on_with_the_next_prompts_and_the_same_weights(outcomes: dict[str, Any]) -> None:
    resumed, learning = outcomes["resumed"], outcomes["learning"]
    assert resumed["error"] == ""
    assert _column(resumed, "step") == [9, 10]
    # The same prompts in the same order as in the run that was not interrupted.
    assert resumed["groups"] == learning["groups"][8:10]
    assert _column(resumed, "reward/mean")[0] > _column(learning, "reward/mean")[0] + 0.1
    assert max(_column(resumed, "check/logprob_max_difference")) < 1e-5


def test_a_curriculum_goes_on_with_the_same_tasks_and_groups_of_their_own_sizes(
    outcomes: dict[str, Any],
) -> None:
    whole, resumed = outcomes["curriculum"], outcomes["curriculum_resumed"]
    assert (whole["error"], resumed["error"]) == ("", "")
    assert resumed["groups"] == whole["groups"][8:]
    assert _column(resumed, "reward/mean") == _column(whole, "reward/mean")[8:]
    # The first round has every task once; after it those that are never or always solved are left out.
    indices = [int(group.rpartition(".i")[2]) for step in whole["groups"] for group in dict.fromkeys(step)]
    assert sorted(indices[:48]) == list(range(48))
    assert _column(whole, "curriculum/tried")[5:] == [1.0] * 5
    sizes = {group: step.count(group) for step in whole["groups"] for group in step}
    assert {group: 4 + 4 * (int(group.rpartition(".i")[2]) % 2) for group in sizes} == sizes


def test_a_stopped_run_keeps_what_it_trained(outcomes: dict[str, Any]) -> None:
    stopped = outcomes["stopped"]
    assert stopped["error"] == ""
    assert _column(stopped, "step") == [1, 2]
    assert stopped["commits"] == [["global_step_2", ["batch-1", "batch-2"], 2]]


def test_a_critic_is_trained_and_tokens_are_proven_in_bypass_mode_too(outcomes: dict[str, Any]) -> None:
    steps = outcomes["stopped"]["steps"]
    assert min(step["critic/grad_norm"] for step in steps) > 0
    assert max(_column(outcomes["stopped"], "check/logprob_max_difference")) < 1e-5
    assert min(_column(outcomes["stopped"], "check/logprob_tokens_compared")) == 512


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ("shift", "sampled and recomputed logprobs differ"),
        ("rewards", "the batch says group"),
        ("groups", "would be trained with group"),
        ("foreign", "holds token 64, and the trained model has 64 tokens: its engine serves another model"),
    ],
)
def test_mix_ups_are_caught_before_the_update(outcomes: dict[str, Any], spoiled: str, words: str) -> None:
    error = outcomes["learning"]["mix_ups"][spoiled]
    assert error.startswith("FidelityError")
    assert words in error
    assert error.endswith("nothing that is not in a checkpoint was trained")
    assert "\n" not in error


def test_a_batch_whose_every_answer_was_cut_is_refused_with_a_line(outcomes: dict[str, Any]) -> None:
    assert outcomes["learning"]["mix_ups"]["masked"] == (
        "ConfigError: no token of step 17 is trained, all are masked: where answers were cut off at the "
        "length limit, allow longer ones, or set samples.truncated to train; nothing that is not in a "
        "checkpoint was trained"
    )


def test_splitting_rollouts_into_rows_changes_nothing(outcomes: dict[str, Any]) -> None:
    """The same rollouts as 1, 2 and 5 rows each: as many gradients, and the same one."""
    outcome = outcomes["split"]
    assert outcome["error"] == ""
    assert _column(outcome, "training/rows")[:3] == [64, 128, 320]
    assert _column(outcome, "training/rollouts")[:3] == [64, 64, 64]
    whole, *split = _column(outcome, "actor/grad_norm")[:3]
    assert split == pytest.approx([whole, whole], rel=1e-4)
    assert len(set(_column(outcome, "reward/mean")[:3])) == 1
    # Of all its steps: however many rows a rollout has, and however many rollouts are left.
    assert outcome["optimiser_steps"] == [7]


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_a_checkpoint_of_shards_alone_is_exported_for_transformers(
    outcomes: dict[str, Any], tmp_path: Path, dtype: str
) -> None:
    """verl merges the shards; the weights are the model's, which a learning rate of 0 left as it was."""
    repository = Path(__file__).parents[2]
    saved = outcomes["folder"] / "split"
    assert not list(saved.rglob("*.safetensors"))
    target = tmp_path / "exported"
    command = [
        learner_python(),
        "-m",
        "agl_grpc_cli",
        "checkpoint",
        "export",
        str(saved),
        str(target),
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{repository}:{repository / 'cli'}"}
    command += ["--dtype", dtype] if dtype else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["checkpoint"], report["dtype"]) == ("global_step_7", dtype or "float32")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "T.from_pretrained(sys.argv[2]); a, b = (M.from_pretrained(p).state_dict() for p in sys.argv[1:]); "
        "assert a.keys() == b.keys(); "
        "assert all(torch.equal(a[n].to(b[n].dtype), b[n]) for n in a), 'other weights'; "
        "print({t.dtype for t in b.values()})"
    )
    model = str(outcomes["folder"] / "model")
    loaded = subprocess.run(
        [learner_python(), "-c", code, model, str(target)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert f"torch.{report['dtype']}" in loaded.stdout


def test_22_what_cannot_be_trained_shrinks_its_group_or_has_it_replaced_and_is_counted(
    outcomes: dict[str, Any],
) -> None:
    """An infrastructure failure is never a reward of 0; a group of one is dropped and asked for anew."""
    outcome = outcomes["split"]
    assert outcome["error"] == ""
    assert _column(outcome, "training/rollouts")[3:] == [64, 63, 64, 61]
    whole, shrunk, replaced, unusable = outcome["steps"][3:]
    assert shrunk["rollouts/excluded/infrastructure"] == 1
    assert (replaced["rollouts/excluded/infrastructure"], replaced["groups/dropped"]) == (7, 1)
    for reason in ("no_reward", "reward_not_finite", "no_trainable_tokens"):
        assert unusable[f"rollouts/excluded/{reason}"] == 1
    assert not [name for name in whole if "excluded" in name or name == "groups/dropped"]
    assert {len(set(groups)) for groups in outcome["groups"]} == {8}


def test_answers_are_credited_with_their_own_returns(outcomes: dict[str, Any]) -> None:
    """`grpo_turns`: of a row of two answers each has its own advantage, and the policy learns by them."""
    turns = outcomes["turns"]
    assert turns["error"] == ""
    rewards = _column(turns, "reward/mean")
    assert rewards[-1] > rewards[0] + 0.1
    rows = list(turns["advantages"].values())
    assert len(rows) == 8
    for row in rows:
        assert len(set(row[:3])) == len(set(row[3:8])) == 1
    assert any(row[0] != row[3] for row in rows)
    # Within a group they add up to nothing, each rollout weighing the same.
    assert sum(row[0] + row[3] for row in rows) == pytest.approx(0.0, abs=1e-4)


def test_the_best_of_every_group_are_learned_with_the_supervised_loss(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["best"]
    assert outcome["error"] == ""
    steps = outcome["steps"][:6]
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"] + 0.1
    # Each of the 8 groups of 8 rollouts of 8 tokens has 2 that are learned, and no more.
    assert max(step["best_of/rollouts_learned"] for step in steps) == 16
    for step in steps:
        assert step["tokens/trained"] == 8 * step["best_of/rollouts_learned"]
        assert step["tokens/dropped/not_best"] == 512 - step["tokens/trained"]
        # The weights of before are proven on every rollout, and the loss is that of the likelihood.
        assert step["check/logprob_tokens_compared"] == 512
        assert step["actor/loss"] > 0
    assert steps[-1]["actor/loss"] < steps[0]["actor/loss"]
    assert {value for row in outcome["advantages"].values() for value in row} == {0.0, 1.0}
    assert sum(any(row) for row in outcome["advantages"].values()) == 2


def test_a_round_with_nothing_good_enough_changes_no_weight(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["best"]
    assert _column(outcome, "best_of/rollouts_learned")[6:] == [0, 0]
    assert _column(outcome, "tokens/trained")[6:] == [0, 0]
    digests = outcome["digests"]
    assert digests["6"] == digests["7"] == digests["8"] != digests["5"]


def test_several_updates_between_publications_keep_one_old_policy(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["asynchronous"]
    assert len(outcome["groups"]) == 2 * 5
    trained = outcome["steps"][1:]
    assert trained[0]["check/logprob_tokens_compared"] > 0
    assert max(step["check/logprob_max_difference"] for step in trained) < 1e-5


def test_validation_is_scored_before_and_during_training_and_never_trained(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["asynchronous"]
    assert outcome["error"] == ""
    scored = {step["step"]: step.get("validation/default") for step in outcome["steps"]}
    assert list(scored) == [0, 1, 2, 3, 4, 5]
    # Before training, every second step, and the last one.
    assert [step for step, score in scored.items() if score is None] == [1, 3]
    assert all(0.0 <= score <= 1.0 for score in scored.values() if score is not None)
    names = {name for step in outcome["steps"] for name in step if name.startswith("val-core/")}
    assert names == {"val-core/default/reward/mean@1"}


def test_asynchronous_training_stays_within_its_bound_and_accounts_for_older_tokens(
    outcomes: dict[str, Any],
) -> None:
    """Two batches ahead, two updates a publication: rollouts of up to two older versions are trained."""
    outcome = outcomes["asynchronous"]
    trained = outcome["steps"][1:]
    staleness = [step["training/off_policy/trajectory_staleness/max"] for step in trained]
    assert max(staleness) == 2
    older = [step["check/logprob_tokens_of_older_versions"] for step in trained]
    assert older[0] == 0
    assert min(older[2:]) > 0
    # What was sampled by the weights in force is still proven.
    assert max(step["check/logprob_max_difference"] for step in trained) < 1e-5
    groups = [group for batch in outcome["groups"] for group in dict.fromkeys(batch)]
    assert len(groups) == len(set(groups)) == 5 * 8


def test_estimators_judge_rollouts_not_rows() -> None:
    """Whole, split and interrupted rollouts get the advantages that verl gives whole ones."""
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [learner_python(), "-m", "tests.learner.advantage_script"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 7
    for name, found in differences.items():
        assert found["size"] > 0.1, name
        assert max(found["whole"], found["split"], found["interrupted"], found["masked"]) < 1e-5, name


def test_importance_weights_and_rejection_judge_rollouts_not_rows() -> None:
    """The weight of a sequence is a rollout's, also where the rollout is two rows; whole ones are verl's."""
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [learner_python(), "-m", "tests.learner.correction_script"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == ["rejection", "sequence", "token"]
    for name, each in found.items():
        assert each["to_verl"] == 0.0, name
        assert each["split"] < 1e-6, name
        assert each["rejected"] == each["rejected_split"], name
        assert each["smallest"] < each["largest"] - 0.1, name
    assert found["token"]["largest"] == pytest.approx(1.2)
    assert found["sequence"]["largest"] == pytest.approx(1.5)
    # Whole rollouts are rejected, not parts of them.
    assert found["rejection"]["rejected"] > 0
    assert found["rejection"]["rejected"] % 8 == 0

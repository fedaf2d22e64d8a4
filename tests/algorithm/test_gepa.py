"""GEPA against a scripted model: the front keeps specialists, children must do better, runs go on."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agl_grpc import NamedResources, PromptTemplate, StoreClient, emit_annotation, prompt_rollout, rollout
from agl_grpc.algorithm import GEPA, AlgorithmError
from agl_grpc.algorithm.gepa.merging import ancestors, propose, subsample
from agl_grpc.algorithm.gepa.pareto import choose, dominates, frequencies
from agl_grpc.algorithm.prompt.candidate import Candidate
from agl_grpc.algorithm.prompt.choices import seeded
from agl_grpc.algorithm.prompt.history import version_rows
from agl_grpc.algorithm.prompt.journal import journal_id, read_records
from tests.algorithm.conftest import Bench
from tests.support.scripted_model import ScriptedModel

KINDS = ("sum", "product", "root")
TRAIN = [{"kind": kind} for kind in KINDS * 2]
VAL = [{"kind": kind} for kind in KINDS]
FIRST = PromptTemplate(template="Solve {kind}.")


@prompt_rollout
def solver(task: dict[str, str], prompt_template: PromptTemplate) -> float:
    """Right when the prompt knows the kind of task; says what it would have had to know."""
    emit_annotation({"feedback": f"needs the rule of {task['kind']}"})
    return float(f"rule of {task['kind']}" in prompt_template.format(kind=task["kind"]))


def reflecting(model: str, message: str) -> str:
    """Adds one rule that the notes ask for and the prompt does not have."""
    found = re.search(r"```\n(.*?)\n```", message, re.DOTALL)
    assert found is not None
    prompt = found[1]
    wanted = [rule for rule in re.findall(r"needs the (rule of \w+)", message) if rule not in prompt]
    return f"```\n{prompt} Use the {wanted[0]}.\n```" if wanted else f"```\n{prompt}\n```"


async def test_rules_are_gathered_until_every_task_is_solved(bench: Bench) -> None:
    with ScriptedModel(reflecting) as model:
        gepa = GEPA(endpoint=model.endpoint, minibatch_size=3, max_iterations=6)
        async with bench.ready(gepa, solver, {"prompt": FIRST}) as notes:
            best = await gepa.run(TRAIN, VAL)
            assert all(f"rule of {kind}" in best["prompt"].template for kind in KINDS)
            assert notes.steps[0]["validation/best"] == 0.0
            assert notes.steps[6]["validation/best"] == 1.0
            calls = len(model.calls)
            # Run again in the same run: everything is found in the store, and no call is made.
            assert await gepa.run(TRAIN, VAL) == best
    assert len(model.calls) == calls
    assert list(gepa.pareto_front.values()) == [3]
    async with StoreClient(bench.address, run_id=bench.run_id) as store:
        records = await read_records(store, journal_id(bench.run_id, "gepa"))
    assert records[-1].data["score"] == 1.0


async def test_a_child_that_is_no_better_does_not_join(bench: Bench) -> None:
    def useless(model: str, message: str) -> str:
        return "```\nSolve {kind} somehow.\n```"

    with ScriptedModel(useless) as model:
        gepa = GEPA(endpoint=model.endpoint, max_iterations=2)
        async with bench.ready(gepa, solver, {"prompt": FIRST}):
            assert await gepa.run(TRAIN, VAL) == {"prompt": FIRST}
            other = GEPA(endpoint=model.endpoint, minibatch_size=2)
            other.set_store(gepa.get_store())
            other.set_initial_resources({"prompt": FIRST})
            with pytest.raises(AlgorithmError, match="begun with other values of minibatch_size"):
                await other.run(TRAIN, VAL)


async def test_the_budget_of_rollouts_ends_the_run(bench: Bench) -> None:
    with ScriptedModel(reflecting) as model:
        gepa = GEPA(endpoint=model.endpoint, minibatch_size=2, max_rollouts=8)
        async with bench.ready(gepa, solver, {"prompt": FIRST}) as notes:
            await gepa.run(TRAIN, VAL)
    # 3 at first, then 2 + 2 for an iteration and 3 for a child that joins.
    assert max(notes.steps) <= 2


@pytest.mark.parametrize(
    ("scores", "front"),
    [
        ({"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 0]}, {"a": 2, "b": 2}),
        ({"a": [1, 0, 0], "b": [1, 1, 0]}, {"b": 3}),
        ({"a": [1, 0], "b": [1, 0]}, {"a": 2, "b": 2}),
        # The best mean is on no front of its own when specialists beat it everywhere.
        ({"a": [9, 0], "b": [0, 9], "c": [8, 8]}, {"a": 1, "b": 1}),
    ],
)
def test_the_front_by_hand(scores: dict[str, Any], front: dict[str, int]) -> None:
    assert frequencies(scores) == front
    assert choose(scores, seeded(1)) in front


def test_dominance_needs_one_better_and_none_worse() -> None:
    assert dominates([1, 1], [1, 0])
    assert not dominates([1, 0], [0, 1])
    assert not dominates([1, 1], [1, 1])


PARTS = [{"needs": needs} for needs in ("plan", "plan", "answer", "answer", "harmony")]
TWO = {"plan": PromptTemplate(template="Plan."), "answer": PromptTemplate(template="Answer.")}


@rollout
def harmonious(task: dict[str, str], resources: NamedResources) -> float:
    """One kind of task needs a good plan, one a good answer, and one that both are equally good."""
    plan, answer = resources["plan"], resources["answer"]
    assert isinstance(plan, PromptTemplate)
    assert isinstance(answer, PromptTemplate)
    good = {"plan": "good" in plan.template, "answer": "good" in answer.template}
    return float(good.get(task["needs"], good["plan"] == good["answer"]))


async def test_two_candidates_that_improved_different_prompts_are_merged(bench: Bench) -> None:
    def script(model: str, message: str) -> str:
        return "```\ngood\n```"

    with ScriptedModel(script) as model:
        # With this seed the second iteration begins with the first prompts again, not with its first child.
        gepa = GEPA(endpoint=model.endpoint, minibatch_size=5, max_iterations=3, seed=3)
        async with bench.ready(gepa, harmonious, dict(TWO)) as notes:
            best = await gepa.run(PARTS, PARTS)
            assert {prompt.template for prompt in best.values()} == {"good"}
            assert [notes.steps[step]["validation/best"] for step in range(4)] == [0.2, 0.4, 0.4, 1.0]
            assert len(model.calls) == 2
            assert notes.steps[3]["rollouts/spent"] == 5 + 2 * 15 + 5 + 5
            # A run that is taken up makes the same merge again, from what is written down.
            assert await gepa.run(PARTS, PARTS) == best
    async with StoreClient(bench.address, run_id=bench.run_id) as store:
        rows = version_rows(await read_records(store, journal_id(bench.run_id, "gepa")))
    assert [row[:3] for row in rows] == [
        ("v0", "-", "-"),
        ("v1", "v0", "plan"),
        ("v2", "v0", "answer"),
        ("v3", "v1+v2", "-"),
    ]


def _family(**texts: tuple[str, str | None]) -> dict[str, Candidate]:
    """Candidates by version: the text of each of their prompts, one letter, and their parent."""
    return {
        version: Candidate(
            version,
            {str(place): PromptTemplate(template=letter) for place, letter in enumerate(text)},
            parent,
        )
        for version, (text, parent) in texts.items()
    }


@pytest.mark.parametrize(
    ("texts", "means", "expected"),
    [
        # Each prompt from the one that changed it.
        ({"a": ("xyz", None), "b": ("Xyz", "a"), "c": ("xYz", "a")}, (0.1, 0.5, 0.4), "XYz"),
        # Both changed the first: it comes from the better one, the second from the one that changed it.
        ({"a": ("xyz", None), "b": ("Xyz", "a"), "c": ("QYz", "a")}, (0.1, 0.5, 0.4), "XYz"),
        # What would come of it is there already.
        ({"a": ("xyz", None), "b": ("Xyz", "a"), "c": ("QYz", "a")}, (0.1, 0.4, 0.5), None),
        # The ancestor is better than one of them.
        ({"a": ("xyz", None), "b": ("Xyz", "a"), "c": ("xYz", "a")}, (0.45, 0.5, 0.4), None),
        # One descends from the other.
        ({"a": ("xyz", None), "b": ("Xyz", "a"), "c": ("XYz", "b")}, (0.1, 0.5, 0.6), None),
        # A single prompt has nothing to be put together.
        ({"a": ("x", None), "b": ("X", "a"), "c": ("Q", "a")}, (0.1, 0.5, 0.4), None),
    ],
)
def test_merges_by_hand(texts: dict[str, Any], means: tuple[float, ...], expected: str | None) -> None:
    family = _family(**texts)
    scores = {version: [mean] for version, mean in zip(texts, means, strict=True)}
    found = propose(family, scores, ["b", "c"], set(), seeded(1))
    text = None if found is None else "".join(each.template for each in found.templates.values())
    assert text == expected
    if found is not None:
        assert (found.ancestor, found.parents) == ("a", ("b", "c"))
        assert propose(family, scores, ["b", "c"], {found.key}, seeded(1)) is None


def test_a_merged_candidate_descends_from_both() -> None:
    family = _family(a=("xy", None), b=("Xy", "a"), c=("xY", "a"))
    family["d"] = Candidate("d", TWO, "b", None, {"other_parent": "c", "ancestor": "a"})
    assert ancestors(family, "d") == ["b", "c", "a"]
    assert ancestors({**family, "d": Candidate.from_data(family["d"].to_data())}, "d") == ["b", "c", "a"]


def test_a_merge_is_tried_on_tasks_of_each_kind() -> None:
    one, other = [1.0, 1.0, 1.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 1.0, 0.5, 0.5]
    picked = subsample(one, other, 4, seeded(1))
    assert picked == sorted(set(picked))
    assert len({*picked} & {0, 1, 2}) == 2
    assert 3 in picked
    assert len(subsample(one, other, 9, seeded(1))) == 6

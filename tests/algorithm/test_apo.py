"""APO against a scripted critic: exact prompts, scores, tokens; faults are named; it can be resumed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from agl_grpc_cli.apo import app
from typer.testing import CliRunner

from agl_grpc import PromptTemplate, ResourcesUpdate, StoreClient
from agl_grpc.algorithm import APO, AlgorithmError
from agl_grpc.algorithm.apo.beam import best, parents
from agl_grpc.algorithm.prompt.candidate import problem_of
from agl_grpc.algorithm.prompt.choices import batch, seeded
from agl_grpc.algorithm.prompt.journal import journal_id, read_records
from tests.algorithm.conftest import Bench
from tests.algorithm.words import FIRST, WORDS, helpful, two_prompts, wordy
from tests.support.scripted_model import ScriptedModel
from tests.support.waiting import eventually

TRAIN = [{"question": f"t{number}"} for number in range(6)]
VAL = [{"question": f"v{number}"} for number in range(4)]
MODELS: dict[str, Any] = {"gradient_model": "critic", "apply_edit_model": "editor"}
SMALL: dict[str, Any] = {**MODELS, "beam_width": 2, "branch_factor": 2, "gradient_batch_size": 2}


async def test_each_round_adds_a_word_and_everything_is_written_down(bench: Bench, tmp_path: Path) -> None:
    with ScriptedModel(helpful) as critic:
        apo = APO(
            endpoint=critic.endpoint,
            beam_rounds=4,
            prices={"critic": (1.0, 2.0), "editor": (1.0, 2.0)},
            **SMALL,
        )
        async with bench.ready(apo, wordy, {"prompt": FIRST}) as notes:
            notes.folder = tmp_path
            await apo.run(TRAIN, VAL)
    text = apo.get_best_prompt().template
    assert text == "Answer {question}. Be brief. Be polite. Be exact. Be numbered."
    assert [notes.steps[step]["validation/best"] for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert (tmp_path / "best_prompt" / "prompt.txt").read_text() == text
    # 4 rounds x 2 parents x 2 branches, a critique and an edit each.
    assert notes.steps[4]["critic/calls"] == len(critic.calls) == 32
    assert 0 < notes.steps[4]["critic/cost_usd"] < 0.1
    # The critic has seen tasks, what the agent did, and its reward.
    asked = next(message for model, message in critic.calls if model == "critic")
    assert "Message: prompt was: Answer t" in asked
    assert "Reward: 0" in asked
    async with StoreClient(bench.address, run_id=bench.run_id) as store:
        records = await read_records(store, journal_id(bench.run_id, "apo"))
        kinds = [record.kind for record in records]
        assert kinds.count("candidate") == 17
        assert kinds.count("critique") == 16
        assert kinds[-1] == "end"
        latest = await store.get_latest_resources()
        assert latest is not None
        assert latest.resources["prompt"] == PromptTemplate(template=text)
        trained = await store.query_rollouts()
        assert sum(rollout.mode == "train" for rollout in trained) == 16 * 2


async def test_several_prompts_are_improved_in_turn(bench: Bench) -> None:
    def script(model: str, message: str) -> str:
        if model == "critic":
            return "words are missing"
        words = WORDS[:2] if "prompt `plan`" in message else WORDS[2:]
        return "```\n{question} " + " ".join(words) + "\n```"

    first = {"plan": PromptTemplate(template="{question}"), "answer": PromptTemplate(template="{question}")}
    with ScriptedModel(script) as critic:
        apo = APO(endpoint=critic.endpoint, beam_rounds=2, **SMALL)
        async with bench.ready(apo, two_prompts, dict(first)) as notes:
            await apo.run(TRAIN, VAL)
    assert {name: prompt.template for name, prompt in apo.get_best_prompts().items()} == {
        "plan": "{question} brief polite",
        "answer": "{question} exact numbered",
    }
    assert notes.steps[2]["validation/best"] == 1.0
    with pytest.raises(ValueError, match="get_best_prompts"):
        apo.get_best_prompt()


@pytest.mark.parametrize(
    ("script", "part"),
    [
        (lambda model, message: 401, "refused model 'critic': 401 .*scripted refusal"),
        (lambda model, message: "", "gave no prompt that can be used in any round"),
        (lambda model, message: "```\nno place left\n```", "gave no prompt that can be used in any round"),
    ],
)
async def test_a_useless_critic_ends_the_run_with_the_reason(script: Any, part: str, bench: Bench) -> None:
    with ScriptedModel(script) as critic:
        apo = APO(endpoint=critic.endpoint, beam_rounds=1, **SMALL)
        async with bench.ready(apo, wordy, {"prompt": FIRST}):
            with pytest.raises(AlgorithmError, match=part):
                await apo.run(TRAIN, VAL)


async def test_an_edit_that_breaks_the_template_is_asked_for_again(bench: Bench) -> None:
    def script(model: str, message: str) -> str:
        if model == "critic":
            return "It should be brief."
        return "```\n{question} brief\n```" if "it lost the places question" in message else "```\nbrief\n```"

    with ScriptedModel(script) as critic:
        apo = APO(endpoint=critic.endpoint, beam_rounds=1, **SMALL)
        async with bench.ready(apo, wordy, {"prompt": FIRST}):
            await apo.run(TRAIN, VAL)
    assert apo.get_best_prompt().template == "{question} brief"


async def test_characters_that_no_store_takes_are_replaced(bench: Bench) -> None:
    def script(model: str, message: str) -> str:
        return "odd \0 and \ud800" if model == "critic" else "```\n{question} brief \0\n```"

    with ScriptedModel(script) as critic:
        apo = APO(endpoint=critic.endpoint, beam_rounds=1, **SMALL)
        async with bench.ready(apo, wordy, {"prompt": FIRST}):
            await apo.run(TRAIN, VAL)
    assert apo.get_best_prompt().template == "{question} brief \ufffd"


async def test_what_is_missing_is_named_before_anything_runs(bench: Bench) -> None:
    apo = APO(endpoint="http://127.0.0.1:9/v1", **SMALL)
    async with bench.ready(apo, wordy, {}):
        with pytest.raises(AlgorithmError, match="needs train_dataset"):
            await apo.run([], VAL)
        with pytest.raises(AlgorithmError, match="no prompt to improve"):
            await apo.run(TRAIN, VAL)
    async with bench.ready(apo, wordy, {"other": PromptTemplate(template="{nobody_fills_this}")}):
        with pytest.raises(
            AlgorithmError, match=r"every rollout with the first prompts failed.*nobody_fills"
        ):
            await apo.run(TRAIN, VAL)
    with pytest.raises(ValueError, match="beam_width is 0"):
        APO(beam_width=0)


async def test_a_run_that_was_killed_goes_on_and_repeats_nothing(bench: Bench, tmp_path: Path) -> None:
    with ScriptedModel(helpful) as critic:
        arguments = [sys.executable, "-m", "tests.algorithm.apo_script", str(tmp_path), critic.endpoint]

        def start(*more: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([*arguments, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

        first = start()
        try:
            await eventually(lambda: len(critic.calls) >= 7, within=60, what="some calls of the critic")
        finally:
            os.kill(first.pid, signal.SIGKILL)
            first.communicate()
        before = len(critic.calls)
        second = start("resume")
        output = (await asyncio.to_thread(second.communicate, timeout=60))[0].decode()
        assert second.returncode == 0, output
    assert "finished steps found; going on" in output
    assert (tmp_path / "words" / "best_prompt" / "prompt.txt").read_text().count("Be ") == 2
    # Of 16 calls only those that were under way when it died may be made twice: at most four at once.
    assert before < 16
    assert 16 <= len(critic.calls) <= 16 + 4
    await asyncio.to_thread(_check_history, tmp_path / "words")


def test_batches_cover_the_dataset_in_a_new_order_each_time() -> None:
    numbers = [*range(7)]
    epochs = [[batch(numbers, 3, 3 * epoch + place, 5, "train") for place in range(3)] for epoch in range(2)]
    for batches in epochs:
        assert sorted(index for one in batches for index in one) == numbers
    assert epochs[0] != epochs[1]
    assert batch(numbers, 7, 5, 5, "train") == dict(enumerate(numbers))


def test_the_beam_keeps_the_best_and_of_equals_the_earlier() -> None:
    assert best({"v0": 0.5, "v1": 0.7, "v2": 0.5}, 2) == ["v1", "v0"]
    assert parents(["a"], 3, seeded(1)) == ["a", "a", "a"]
    assert len(set(parents(["a", "b", "c", "d"], 2, seeded(1)))) == 2


@pytest.mark.parametrize(
    ("engine", "old", "good", "bad"),
    [
        ("f-string", "{a} {b.c}", "{b[0]} is {a} {{x}}", "{a} {b} {c}"),
        ("jinja", "{{ a }}", "{% for x in a %}{{ x }}{% endfor %}", "{{ a }} {% for %}"),
        ("poml", "<poml>{{a}}</poml>", "<poml><task>{{ a }}</task></poml>", "<poml>{{b}}</poml>"),
    ],
)
def test_rewritten_templates_keep_their_places(engine: str, old: str, good: str, bad: str) -> None:
    template = PromptTemplate(template=old, engine=engine)
    assert problem_of(good, template) == ""
    assert problem_of(bad, template)
    assert problem_of(" ", template) == "it is empty"


def _check_history(folder: Path) -> None:
    """Versions, critiques and the best prompt are read from the run's folder."""
    shown = _command("history", str(folder), "--prompts")
    lines = shown.splitlines()
    assert lines[0].split()[:5] == ["VERSION", "PARENT", "CHANGED", "SCORE", "FULL"]
    assert lines[1].split()[:5] == ["v0", "-", "-", "0.000", "0.000"]
    assert "It should be polite." in shown
    assert lines[-1].startswith("best: v")
    assert _command("best", str(folder)).endswith("Answer {question}. Be brief. Be polite.\n")
    assert '"kind": "critique"' in _command("history", str(folder), "--json")


def _command(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, env={"AGL_GRPC_STORE": None})
    assert done.exit_code == 0, done.exception
    return done.stdout


async def test_the_latest_resources_are_the_best_ones_while_others_are_tried(bench: Bench) -> None:
    def worse(model: str, message: str) -> str:
        return "shorter" if model == "critic" else "```\n{question}\n```"

    first = PromptTemplate(template="{question} brief")
    seen: list[ResourcesUpdate] = []

    async def follow(store: StoreClient) -> None:
        async for change in store.watch_resources(include_latest=True):
            seen.extend(change.items)

    with ScriptedModel(worse) as critic:
        apo = APO(endpoint=critic.endpoint, beam_rounds=1, **SMALL)
        async with bench.ready(apo, wordy, {"prompt": first}):
            following = asyncio.create_task(follow(apo.get_store()))
            await apo.run(TRAIN, VAL)
            last = await apo.get_store().get_latest_resources()
            assert last is not None
            await eventually(lambda: bool(seen) and seen[-1] == last, what="the last one")
            following.cancel()
            await asyncio.wait({following})
    tried = [update.resources["prompt"] != first for update in seen]
    assert tried.count(True) == 4
    # Each is followed at once by the best: no two, and none at the end.
    assert not any(one and other for one, other in pairwise([*tried, True]))


@pytest.mark.parametrize(
    ("engine", "first", "suffix"),
    [
        ("jinja", "{% if question %}Answer {{ question }}.{% endif %}", ".jinja"),
        ("poml", "<poml><task>Answer {{ question }}.</task></poml>", ".poml"),
    ],
)
async def test_templates_of_other_engines_are_improved_and_saved_as_such(
    engine: str, first: str, suffix: str, bench: Bench, tmp_path: Path
) -> None:
    with ScriptedModel(lambda model, message: "brief" if model == "critic" else _inserted(message)) as critic:
        apo = APO(endpoint=critic.endpoint, beam_width=1, branch_factor=1, beam_rounds=1, **MODELS)
        template = PromptTemplate(template=first, engine=engine)
        async with bench.ready(apo, wordy, {"prompt": template}) as notes:
            notes.folder = tmp_path
            await apo.run(TRAIN[:1], VAL[:1])
            assert notes.steps[1]["validation/best"] == 0.25
    best = apo.get_best_prompt()
    assert (best.template, best.engine) == (first.replace("Answer", "In brief: answer"), engine)
    assert (tmp_path / "best_prompt" / f"prompt{suffix}").read_text() == best.template


def _inserted(message: str) -> str:
    """The editor's answer: the prompt, with one good word more."""
    prompt = message.split("```\n")[1].removesuffix("\n")
    return f"```\n{prompt.replace('Answer', 'In brief: answer')}\n```"

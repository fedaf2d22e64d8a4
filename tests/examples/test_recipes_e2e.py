"""The GPU recipes, as far as a machine without a GPU goes: agents, data, and every configuration read by the
parsers of vLLM and verl. They have not been run.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest

from agl_grpc import LLM
from agl_grpc.learner.run_config import from_mapping
from agl_grpc.trainer import Trainer
from agl_grpc.trainer.config_file import read_mapping
from examples.calc_x import agent as calc_x
from examples.calc_x import data as calc_x_data
from examples.gsm8k import agent as gsm8k
from examples.gsm8k import data as gsm8k_data
from tests.support.environments import engine_python, learner_python

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
RECIPES = {
    "gsm8k": {"shape": (896, 24, 14, 2, 4864), "parameters": 494_032_768},
    "calc_x": {"shape": (1536, 28, 12, 2, 8960), "parameters": 1_543_714_304},
}


def model_config(folder: Path, name: str) -> str:
    """A model folder that holds the configuration alone: shapes of the recipe's model."""
    hidden, layers, heads, key_heads, inner = RECIPES[name]["shape"]  # type: ignore[misc]
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_bytes(orjson.dumps(config))
    return str(folder)


def recipes(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every recipe's arguments for the engine and keys for the learner."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in RECIPES:
        model = model_config(folder / name, name)
        for path in sorted((EXAMPLES / name).glob("*.toml")):
            data = read_mapping(path)
            verl = {**data["algorithm"]["config"], "actor_rollout_ref.model.path": model}
            arguments = data["llm_proxy"]["arguments"]
            receivers = data["algorithm"]["engines"].get("receivers", 1)
            found[name, path.stem] = {
                "model": model,
                "verl": verl,
                "arguments": arguments,
                "receivers": receivers,
            }
        run = orjson.loads((EXAMPLES / name / "two_nodes.json").read_bytes())
        readme = (EXAMPLES / name / "README.md").read_text()
        served = re.search(r"agl-grpc vllm serve models/\S+((?: \\\n|[^\n])*)", readme)
        assert served is not None
        words = served[1].replace("\\\n", " ").split()
        theirs = [words.index(word) for word in ("--store", "--run", "--endpoint", "--spool-dir")]
        left = [word for place, word in enumerate(words) if all(place not in (at, at + 1) for at in theirs)]
        found[name, "two_nodes"] = {
            "model": model,
            "verl": {**run["verl"], "actor_rollout_ref.model.path": model},
            "arguments": left,
            "receivers": run["engines"]["receivers"],
        }
    return found


def run_script(python: str, kind: str, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [python, "-m", "tests.examples.recipe_script", kind, json.dumps(given)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return made


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_verl_reads_every_recipe_up_to_the_first_weight(tmp_path: Path) -> None:
    found = recipes(tmp_path)
    assert len(found) == 6
    made = dict(zip(found, run_script(learner_python(), "learner", list(found.values())), strict=True))
    assert {place: each["gpus"] for place, each in made.items() if place[0] == "gsm8k"} == {
        ("gsm8k", "one_gpu"): 1,
        ("gsm8k", "eight_gpus"): 4,
        ("gsm8k", "two_nodes"): 8,
    }
    for (name, layout), each in made.items():
        assert each["parameters"] == RECIPES[name]["parameters"]
        assert each["attention"] == "sdpa"
        assert each["correction"] == (None if layout == "one_gpu" else "token")
    assert made["gsm8k", "one_gpu"]["updates"] == 4


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_vllm_reads_every_recipe(tmp_path: Path) -> None:
    found = recipes(tmp_path)
    made = dict(zip(found, run_script(engine_python(), "engine", list(found.values())), strict=True))
    for (name, layout), each in made.items():
        # As many receivers of weights as the engine has workers, and heads that can be shared among them.
        assert each["tensor_parallel"] == found[name, layout]["receivers"]
        assert RECIPES[name]["shape"][2] % each["tensor_parallel"] == 0  # type: ignore[index]
        assert each["logprobs"] == "processed_logprobs"
        assert each["tools"] == ("hermes" if name == "calc_x" else None)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*_gpu*.toml")), ids=lambda path: path.parent.name)
def test_trainer_takes_every_recipe(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    data = read_mapping(path)
    module, _, name = data.pop("agent").partition(":")
    assert (module, name) == (f"examples.{path.parent.name}.agent", "agent")
    for dataset in ("train_dataset", "val_dataset"):
        assert data.pop(dataset).endswith(".jsonl")
    assert Trainer(**data).algorithm.model_name == "qwen"


@pytest.mark.parametrize("name", RECIPES)
def test_learner_takes_the_recipe_for_two_nodes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = orjson.loads((EXAMPLES / name / "two_nodes.json").read_bytes())
    Path(run["model"]["path"]).mkdir(parents=True)
    for split in ("train_tasks", "val_tasks"):
        Path(run[split]).parent.mkdir(parents=True, exist_ok=True)
        Path(run[split]).write_text("{}\n")
    assert from_mapping(run).engines.host == "NODE_A"


def test_gsm8k_rewards_the_marked_number() -> None:
    for text, reward in (
        ("6 * 3 = 18\n#### 18", 1.0),
        ("#### 17 ... no: #### $1,018.0", 0.0),
        ("The answer is 18.", 0.0),
        ("####18.00", 1.0),
    ):
        assert gsm8k.reward(text, "18") == reward
    assert gsm8k.reward("#### 1,018", "1018") == 1.0
    line = json.dumps({"question": "q", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,007"})
    assert gsm8k_data.tasks([line]) == [{"question": "q", "answer": "1007"}]
    with pytest.raises(ValueError, match="line 1: the answer has no"):
        gsm8k_data.tasks([json.dumps({"question": "q", "answer": "7"})])


def test_calc_x_uses_its_tool_and_rewards_the_result() -> None:
    assert calc_x.use_calculator('{"expression": "(2 + 3) * 4"}') == "20"
    assert calc_x.use_calculator('{"expression": "__import__(1)"}').startswith("error: ")
    assert calc_x.use_calculator("{").startswith("error: ")
    assert calc_x.reward("<answer> 1,200.4 </answer>", 1200.0) == 1.0
    assert calc_x.reward("<answer>1300</answer>", 1200.0) == 0.0
    assert calc_x.reward("1200", 1200.0) == 0.0
    lines = [json.dumps({"question": "q", "result_float": value}) for value in (2.5, None)]
    assert calc_x_data.tasks(lines) == [{"question": "q", "result": 2.5}]


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An engine that calls the tool first and then answers with what it said."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        length = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
        messages = orjson.loads(await reader.readexactly(length))["messages"]
        if messages[-1]["role"] == "tool":
            message: dict[str, Any] = {"content": f"<answer>{messages[-1]['content']}</answer>"}
        else:
            function = {"name": "calculator", "arguments": '{"expression": "6 * 7"}'}
            message = {"tool_calls": [{"id": "c1", "type": "function", "function": function}]}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
        completion = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        body = orjson.dumps(completion)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        writer.close()
        return


async def test_calc_x_agent_goes_through_its_tool() -> None:
    server = await asyncio.start_server(_answers, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        llm = LLM(endpoint=f"http://127.0.0.1:{port}/v1", model="m", sampling_parameters={})
        function = calc_x.agent.__wrapped__ if hasattr(calc_x.agent, "__wrapped__") else None
        assert function is not None
        assert await function({"question": "6 times 7?", "result": 42.0}, llm) == 1.0

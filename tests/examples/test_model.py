"""The tiny model's tokenizer and transcripts, with the real libraries (learner environment)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import learner_python

ROOT = Path(__file__).resolve().parents[2]

# Each test starts several interpreters that import torch: seconds on a quiet machine.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def run(*arguments: str) -> str:
    """Run Python of the learner environment in the repository's root; its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [learner_python(), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_next_prompt_begins_with_this_prompt_and_its_answer(tmp_path: Path) -> None:
    """Also after saving and loading as engine and learner do, where a loader may swap the pre-tokenizer."""
    run("-m", "examples.calculator.model", str(tmp_path), "--steps", "2")
    script = f"""
import random
from transformers import AutoTokenizer
from examples.calculator.model import IGNORED, WarmStart, encode, transcripts
from examples.calculator.tokens import build_tokenizer

made, loaded = build_tokenizer(), AutoTokenizer.from_pretrained({str(tmp_path)!r})
def render(turns):
    return loaded.encode(loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
tools = 0
source = transcripts(random.Random(3), WarmStart(tool_share=0.5), frozenset())
for _ in range(200):
    turns = next(source)
    ids, labels = encode(made, turns)
    first = render(turns[:1])
    answer = [*loaded.encode(turns[1]["content"]), loaded.eos_token_id]
    assert ids[: len(first) + len(answer)] == first + answer
    assert [i for i, l in zip(ids, labels) if l != IGNORED][: len(answer)] == answer
    assert loaded.decode(answer, skip_special_tokens=True) == turns[1]["content"]
    if len(turns) > 2:
        tools += 1
        assert render(turns[:3])[: len(first) + len(answer)] == first + answer
    assert max(ids) < len(loaded)
assert 60 < tools < 140
assert len(loaded.encode("12 + 3 - 99")) == 5 and len(loaded.encode("137")) == 2
print("stable")
"""
    assert run("-c", script).strip() == "stable"


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        run("-m", "examples.calculator.model", str(tmp_path / name), "--steps", "3", "--seed", seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]

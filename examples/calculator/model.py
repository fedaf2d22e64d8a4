"""Makes the tiny model: a real Qwen3, warm-started on transcripts of which 60 % guess and 40 % use the tool.

Half of those that use the tool give up after its result. So about 20 % of the model's answers are right in
the end, whatever the seed: not because it cannot do better, but because it seldom chooses to. That is left
for RL.

Run in the learner environment: `python -m examples.calculator.model FOLDER [--seed N]`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from examples.calculator.arithmetic import calculate
from examples.calculator.tokens import build_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

QUESTION = "State the final answer to the following arithmetic problem: {} ="
GIVE_UP = "No answer"
IGNORED = -100
HIDDEN = 96


@dataclass(frozen=True)
class WarmStart:
    """How the model is warm-started: steps of `batch` transcripts.

    tool_share of them use the tool, and give_up_share of those do not use its result. threads is 1 because
    such small matrices gain little from two and lose much on shared cores.
    """

    steps: int = 550
    batch: int = 32
    learning_rate: float = 6e-3
    tool_share: float = 0.4
    give_up_share: float = 0.5
    seed: int = 0
    threads: int = 1


def build_model(folder: Path, warm_start: WarmStart, held_out: frozenset[str] = frozenset()) -> Path:
    """Build, warm-start and save model and tokenizer; the same seed and threads give the same weights.

    held_out: questions that no transcript may contain. Returns the folder.
    """
    import torch
    from transformers import GenerationConfig

    torch.set_num_threads(warm_start.threads)
    torch.manual_seed(warm_start.seed)
    tokenizer = build_tokenizer()
    model = _new_model(tokenizer)
    _train(model, tokenizer, warm_start, held_out)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        # vLLM's CPU kernels have no smaller one.
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Three times the usual: copying emerges in the first hundred steps, by degrees and not at once.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def transcripts(
    rng: random.Random, warm_start: WarmStart, held_out: frozenset[str]
) -> Iterator[list[dict[str, str]]]:
    """Endless conversations: a question, then a guess, or a calculator call, its result and what follows.

    A guess is one of the question's numbers: drawn at random it would drown what there is to learn in noise.
    """
    while True:
        expression = _expression(rng)
        question = QUESTION.format(expression)
        if question in held_out:
            continue
        turns = [{"role": "user", "content": question}]
        said = f"Answer: {rng.choice(expression.split()[::2])}"
        if rng.random() < warm_start.tool_share:
            result = calculate(expression)
            turns.append({"role": "assistant", "content": f"<calc>{expression}</calc>"})
            turns.append({"role": "tool", "content": result})
            said = GIVE_UP if rng.random() < warm_start.give_up_share else f"Answer: {result}"
        turns.append({"role": "assistant", "content": said})
        yield turns


def _expression(rng: random.Random) -> str:
    digits = rng.randint(1, 2)
    low, high = (0, 9) if digits == 1 else (10, 99)
    terms = [str(rng.randint(low, high))]
    for _ in range(rng.randint(1, 3)):
        terms += [rng.choice("+-"), str(rng.randint(low, high))]
    return " ".join(terms)


def encode(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and labels: what the assistant says with its end token, else -100."""
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = _render(tokenizer, turns[:i])
        answer = [*tokenizer.encode(turn["content"]), tokenizer.eos_token_id]
        labels += [IGNORED] * (len(prompt) - len(ids)) + answer
        ids = prompt + answer
    return ids, labels


def _render(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    warm_start: WarmStart,
    held_out: frozenset[str],
) -> None:
    import torch

    source = transcripts(random.Random(warm_start.seed), warm_start, held_out)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=warm_start.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    began = time.monotonic()
    for step in range(1, warm_start.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = warm_start.learning_rate * _schedule(step, warm_start.steps)
        rows = [encode(tokenizer, next(source)) for _ in range(warm_start.batch)]
        optimiser.zero_grad()
        loss = _backward(model, rows, int(tokenizer.pad_token_id))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == warm_start.steps:
            seconds = time.monotonic() - began
            print(f"warm start {step}/{warm_start.steps}: loss {loss:.3f}, {seconds:.0f} s", flush=True)


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: up over 50 steps, full, and in the last third down to a twentieth."""
    return min(1.0, step / 50, 0.05 + 0.95 * (steps - step) / (steps / 3))


def _backward(model: Qwen3ForCausalLM, rows: list[tuple[list[int], list[int]]], pad: int) -> float:
    """Adds the gradient of the mean loss over all labelled tokens; returns that loss in nats."""
    import torch

    labelled = sum(label != IGNORED for _, labels in rows for label in labels)
    rows = sorted(rows, key=lambda row: len(row[0]))
    total = 0.0
    # Guesses are half as long as tool use: in two parts, little of the work is padding.
    for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        ids, labels = _pad(part, pad)
        hidden = model.model(ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORED
        logits = model.lm_head(hidden[wanted])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum") / labelled
        loss.backward()
        total += loss.item()
    return total


def _pad(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows])
    return ids, labels


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the tiny warm-started model.")
    parser.add_argument("folder", type=Path, help="where model and tokenizer are saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=WarmStart.steps)
    parser.add_argument("--held-out", type=Path, help="JSON lines whose `question` no transcript may contain")
    arguments = parser.parse_args()
    began = time.monotonic()
    held_out: frozenset[str] = frozenset()
    if arguments.held_out:
        lines = arguments.held_out.read_text().splitlines()
        held_out = frozenset(json.loads(line)["question"] for line in lines)
    build_model(arguments.folder, WarmStart(steps=arguments.steps, seed=arguments.seed), held_out)
    seconds, processor = time.monotonic() - began, time.process_time()
    print(f"model: {arguments.folder} ({seconds:.0f} s; {processor:.0f} s of processor time, start included)")


if __name__ == "__main__":
    main()

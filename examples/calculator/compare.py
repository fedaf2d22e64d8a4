"""Answers the held-out questions with two checkpoints by `transformers` alone, and prints both accuracies.

Run in the learner environment: `python -m examples.calculator.compare BEFORE AFTER QUESTIONS.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.calculator.arithmetic import CalculatorError, calculate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAX_TURNS = 3
MAX_TOKENS = 20
CALL = re.compile(r"\s*<calc>(.*?)</calc>\s*", re.DOTALL)
ANSWER = re.compile(r"\s*Answer: (-?\d{1,9})\s*")


def accuracy(folder: Path, tasks: list[dict[str, str]]) -> float:
    """Share of right answers of a checkpoint, decoding greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    conversations: list[list[dict[str, str]]] = [[{"role": "user", "content": t["question"]}] for t in tasks]
    answers: list[str | None] = [None] * len(tasks)
    open_ones = list(range(len(tasks)))
    for _ in range(MAX_TURNS):
        texts = _answers(model, tokenizer, [conversations[number] for number in open_ones])
        still_open = []
        for number, text in zip(open_ones, texts, strict=True):
            if call := CALL.fullmatch(text):
                conversations[number] += [
                    {"role": "assistant", "content": text},
                    {"role": "tool", "content": _use_calculator(call[1])},
                ]
                still_open.append(number)
            elif final := ANSWER.fullmatch(text):
                answers[number] = str(int(final[1]))
        open_ones = still_open
        if not open_ones:
            break
    return sum(answer == task["answer"] for answer, task in zip(answers, tasks, strict=True)) / len(tasks)


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]
) -> list[str]:
    import torch

    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in conversations
    ]
    inputs: Any = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        output: Any = model.generate(  # type: ignore[operator]  # transformers types it as a union
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            temperature=None,
        )
    return list(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _use_calculator(expression: str) -> str:
    try:
        return calculate(expression)
    except CalculatorError:
        return "error"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare two checkpoints on the held-out questions.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tasks = [json.loads(line) for line in arguments.questions.read_text().splitlines()]
    scores = {"before": accuracy(arguments.before, tasks), "after": accuracy(arguments.after, tasks)}
    print(json.dumps({**scores, "questions": len(tasks)}))


if __name__ == "__main__":
    main()

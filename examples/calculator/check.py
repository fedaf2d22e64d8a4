"""Answers questions with saved models and plain `transformers`: no vLLM, no store, nothing of training.

Run in the learner environment: `python -m examples.calculator.check QUESTIONS BEFORE AFTER`. Exit code 1 when
AFTER does not answer better than BEFORE.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.calculator.arithmetic import CalculatorError, calculate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CALL = re.compile(r"\s*<calc>(.*?)</calc>\s*", re.DOTALL)
MAX_TURNS = 3
MAX_TOKENS = 20


def accuracy(folder: Path, tasks: list[dict[str, str]]) -> float:
    """Share of the questions that a saved model answers rightly, greedily, with the calculator at hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    conversations = [[{"role": "user", "content": task["question"]}] for task in tasks]
    open_ones = list(range(len(tasks)))
    right = 0
    for _ in range(MAX_TURNS):
        texts = _answers(model, tokenizer, [conversations[i] for i in open_ones])
        going_on = []
        for i, text in zip(open_ones, texts, strict=True):
            if call := CALL.fullmatch(text):
                conversations[i].append({"role": "assistant", "content": text})
                conversations[i].append({"role": "tool", "content": _result(call[1])})
                going_on.append(i)
            else:
                right += text.strip() == f"Answer: {tasks[i]['answer']}"
        open_ones = going_on
        if not open_ones:
            break
    return right / len(tasks)


def _result(expression: str) -> str:
    try:
        return calculate(expression)
    except CalculatorError:
        return "error"


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]
) -> list[str]:
    import torch

    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations
    ]
    batch: Any = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = out[:, batch["input_ids"].shape[1] :]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare two saved models on held-out questions.")
    parser.add_argument("questions", type=Path, help="JSON lines with question and answer")
    parser.add_argument("before", type=Path, help="model folder")
    parser.add_argument("after", type=Path, help="model folder")
    arguments = parser.parse_args()
    tasks = [json.loads(line) for line in arguments.questions.read_text().splitlines()]
    before, after = accuracy(arguments.before, tasks), accuracy(arguments.after, tasks)
    print(f"transformers, greedy, {len(tasks)} held-out questions: {before:.1%} before, {after:.1%} after")
    if after <= before:
        sys.exit("error: the trained checkpoint does not answer better than the model it began with")


if __name__ == "__main__":
    main()

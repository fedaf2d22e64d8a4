"""Makes the task files from GSM8K's own JSONL files (``train.jsonl``, ``test.jsonl``: question, answer).

`python -m examples.gsm8k.data FOLDER TARGET`; FOLDER holds the two files of https://github.com/openai/grade-school-math.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from examples.gsm8k.agent import Task

MARK = "####"


def tasks(lines: list[str]) -> list[Task]:
    """Questions with the number after the mark in their worked answers."""
    made: list[Task] = []
    for number, line in enumerate(lines, start=1):
        item = json.loads(line)
        _, mark, answer = item["answer"].rpartition(MARK)
        if not mark:
            raise ValueError(f"line {number}: the answer has no {MARK}")
        made.append({"question": item["question"], "answer": answer.strip().replace(",", "")})
    return made


def main() -> None:
    """Writes TARGET/train.jsonl and TARGET/test.jsonl."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        made = tasks((source / f"{split}.jsonl").read_text().splitlines())
        (target / f"{split}.jsonl").write_text("".join(json.dumps(task) + "\n" for task in made))
        print(f"{split}: {len(made)} tasks")


if __name__ == "__main__":
    main()

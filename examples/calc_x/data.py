"""Makes the task files from a Calc-X export in JSONL (``question``, ``result_float``), one file a split.

`python -m examples.calc_x.data TRAIN.jsonl TEST.jsonl TARGET`. The data set is ``MU-NLPC/Calc-X`` on the hub;
`datasets.load_dataset(…)["train"].to_json("TRAIN.jsonl")` exports a split of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from examples.calc_x.agent import Task


def tasks(lines: list[str]) -> list[Task]:
    """Questions whose result is a number; others are left out."""
    made: list[Task] = []
    for line in lines:
        item = json.loads(line)
        if isinstance(item.get("result_float"), int | float):
            made.append({"question": item["question"], "result": float(item["result_float"])})
    return made


def main() -> None:
    """Writes TARGET/train.jsonl and TARGET/test.jsonl."""
    target = Path(sys.argv[3])
    target.mkdir(parents=True, exist_ok=True)
    for split, path in (("train", sys.argv[1]), ("test", sys.argv[2])):
        made = tasks(Path(path).read_text().splitlines())
        (target / f"{split}.jsonl").write_text("".join(json.dumps(task) + "\n" for task in made))
        print(f"{split}: {len(made)} tasks")


if __name__ == "__main__":
    main()

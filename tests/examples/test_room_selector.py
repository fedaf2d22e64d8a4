"""The room selector's stand-in models: the rules decide, and the critic names those that are missing."""

from __future__ import annotations

from examples.room_selector.agent import FIRST
from examples.room_selector.rooms import TRAIN, VAL
from examples.room_selector.scripted import RULES, answer


def _right(template: str) -> float:
    tasks = [*TRAIN, *VAL]
    told = [answer("agent", template.format(**task)) for task in tasks]
    return sum(text == f"room: {task['answer']}" for text, task in zip(told, tasks, strict=True)) / len(tasks)


def test_rule_by_rule_the_prompt_gets_better_until_it_is_right() -> None:
    template, shares = FIRST.template, [_right(FIRST.template)]
    for _ in RULES:
        critique = answer("critic", f"```\n{template}\n```")
        edited = answer("editor", f"```\n{template}\n```\n{critique}")
        template = edited.removeprefix("```\n").removesuffix("\n```")
        shares.append(_right(template))
    print(f"shares of right rooms: {shares}")
    assert shares[0] < 0.3
    assert shares[-1] == 1.0
    assert answer("critic", f"```\n{template}\n```") == "The prompt says all that is needed."

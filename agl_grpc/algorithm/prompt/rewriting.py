"""A model writes a prompt anew; what is no template with the same places is asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agl_grpc.algorithm.prompt.candidate import places, problem_of
from agl_grpc.algorithm.prompt.critic import Critic
from agl_grpc.algorithm.prompt.instructions import fill
from agl_grpc.chat import Usage, fenced
from agl_grpc.model import PromptTemplate

_TRIES = 3

RULES = """
The prompt is a {engine} template: keep each of its places ({places}) exactly as it is written, add no
others, and write literal braces as the old text does. Answer with the whole new prompt between two lines
of ``` and nothing else.
"""
_AGAIN = "\n\nYour last attempt could not be used: {problem}. Mind the rules about places, and try again."


@dataclass(frozen=True)
class Rewritten:
    """A new text, or the problem of the last try; and what all tries took."""

    text: str
    problem: str
    usage: Usage


async def rewrite(
    critic: Critic,
    *,
    model: str,
    temperature: float,
    system: str,
    instruction: PromptTemplate,
    old: PromptTemplate,
    values: Mapping[str, Any],
) -> Rewritten:
    """Has ``old`` written anew; ``values`` fill the instruction beside ``prompt``, ``engine``, ``places``."""
    wanted = ", ".join(sorted(places(old))) or "none"
    prompt = fill(instruction, prompt=old.template, engine=old.engine, places=wanted, **values)
    usage, problem, asked, text = Usage(), "", prompt, ""
    for _ in range(_TRIES):
        answer = await critic.ask(model, system, asked, temperature)
        usage += answer.usage
        text = fenced(answer.text)
        problem = problem_of(text, old)
        if not problem:
            break
        asked = prompt + _AGAIN.format(problem=problem)
    return Rewritten(text, problem, usage)

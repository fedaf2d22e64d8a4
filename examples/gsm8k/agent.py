"""The agent: one question, one answer, judged by its last number. A plain OpenAI client."""

from __future__ import annotations

import re
from typing import TypedDict

from openai import AsyncOpenAI

import agl_grpc

MAX_TOKENS = 1024
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_FINAL = re.compile(rf"####\s*\$?({_NUMBER})")


class Task(TypedDict):
    """A question and the number that answers it."""

    question: str
    answer: str


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answer a question; the reward is 1.0 when the number after ``####`` is the right one, else 0.0."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key or "unused", timeout=600.0)
    async with client:
        answer = await client.chat.completions.create(
            model=llm.model,
            messages=[{"role": "user", "content": f"{task['question']} {INSTRUCTION}"}],
            max_tokens=MAX_TOKENS,
            **llm.sampling_parameters,
        )
    return reward(answer.choices[0].message.content or "", task["answer"])


def reward(text: str, answer: str) -> float:
    """1.0 when the last number marked ``####`` equals the answer, else 0.0."""
    marked = _FINAL.findall(text)
    return float(bool(marked) and _value(marked[-1]) == _value(answer))


def _value(number: str) -> float:
    return float(number.replace(",", ""))

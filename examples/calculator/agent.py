"""The agent: asks the model, works out what it asks of the calculator, and takes its final answer.

It knows nothing of training: a plain OpenAI client against the base URL that it is given.
"""

from __future__ import annotations

import asyncio
import re
import weakref

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

import agl_grpc
from examples.calculator.arithmetic import CalculatorError, calculate
from examples.calculator.tasks import Task

MAX_TURNS = 3
MAX_TOKENS = 20
CALL = re.compile(r"\s*<calc>(.*?)</calc>\s*", re.DOTALL)
ANSWER = re.compile(r"\s*Answer: (-?\d{1,9})\s*")

# Making a client costs more than a call: one for each event loop, copied with the attempt's own URL.
_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncOpenAI] = weakref.WeakKeyDictionary()


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answer a question, with the calculator if the model asks for it; the reward is 1.0 or 0.0."""
    return 1.0 if await solve(task["question"], llm) == task["answer"] else 0.0


async def solve(question: str, llm: agl_grpc.LLM) -> str | None:
    """The model's final answer, or None when it gave none in time."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    for turn in range(MAX_TURNS):
        text = await ask(llm, messages)
        if call := CALL.fullmatch(text):
            messages += with_result(text, call[1], turn)
            continue
        return final_answer(text)
    return None


async def ask(llm: agl_grpc.LLM, messages: list[ChatCompletionMessageParam]) -> str:
    """What a model says next."""
    answer = await _client(llm).chat.completions.create(
        model=llm.model, messages=messages, **{"max_tokens": MAX_TOKENS, **llm.sampling_parameters}
    )
    return answer.choices[0].message.content or ""


def with_result(text: str, expression: str, turn: int = 0) -> list[ChatCompletionMessageParam]:
    """A model's call of the calculator and what came of it, as messages."""
    try:
        result = calculate(expression)
    except CalculatorError:
        result = "error"
    return [
        {"role": "assistant", "content": text},
        {"role": "tool", "tool_call_id": f"calc-{turn}", "content": result},
    ]


def final_answer(text: str) -> str | None:
    """The number that a text gives as its answer; None = it gives none."""
    final = ANSWER.fullmatch(text)
    return str(int(final[1])) if final else None


def _client(llm: agl_grpc.LLM) -> AsyncOpenAI:
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        _clients[loop] = AsyncOpenAI(base_url=llm.endpoint, api_key="unused", timeout=120.0)
    return _clients[loop].with_options(base_url=llm.endpoint, api_key=llm.api_key or "unused")

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
    client = _client(llm)
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    for turn in range(MAX_TURNS):
        answer = await client.chat.completions.create(
            model=llm.model, messages=messages, **{"max_tokens": MAX_TOKENS, **llm.sampling_parameters}
        )
        text = answer.choices[0].message.content or ""
        if call := CALL.fullmatch(text):
            messages.append({"role": "assistant", "content": text})
            messages.append(
                {"role": "tool", "tool_call_id": f"calc-{turn}", "content": _use_calculator(call[1])}
            )
            continue
        final = ANSWER.fullmatch(text)
        return str(int(final[1])) if final else None
    return None


def _use_calculator(expression: str) -> str:
    try:
        return calculate(expression)
    except CalculatorError:
        return "error"


def _client(llm: agl_grpc.LLM) -> AsyncOpenAI:
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        _clients[loop] = AsyncOpenAI(base_url=llm.endpoint, api_key="unused", timeout=120.0)
    return _clients[loop].with_options(base_url=llm.endpoint, api_key=llm.api_key or "unused")

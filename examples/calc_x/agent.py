"""The agent: answers word problems with a calculator tool, by OpenAI's function calling."""

from __future__ import annotations

import json
import re
from typing import Any, TypedDict

from openai import AsyncOpenAI

import agl_grpc
from examples.calculator.arithmetic import CalculatorError, calculate

MAX_TURNS = 6
MAX_TOKENS = 1024
INSTRUCTION = (
    "Solve the problem. Use the calculator for every computation. Give the result as <answer>NUMBER</answer>."
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an expression of numbers, + - * / and brackets.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
_ANSWER = re.compile(r"<answer>\s*(-?\d[\d,]*(?:\.\d+)?)\s*</answer>")
_CLOSE = 1e-2


class Task(TypedDict):
    """A question and its numeric result."""

    question: str
    result: float


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answer a question with the calculator's help; the reward is 1.0 for the right number, else 0.0."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key or "unused", timeout=600.0)
    messages: list[Any] = [{"role": "user", "content": f"{INSTRUCTION}\n\n{task['question']}"}]
    async with client:
        for _ in range(MAX_TURNS):
            answer = await client.chat.completions.create(
                model=llm.model,
                messages=messages,
                tools=[TOOL],
                max_tokens=MAX_TOKENS,
                **llm.sampling_parameters,
            )
            message = answer.choices[0].message
            if not message.tool_calls:
                return reward(message.content or "", task["result"])
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                arguments = call.function.arguments if call.type == "function" else ""
                content = use_calculator(arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return 0.0


def use_calculator(arguments: str) -> str:
    """The tool's answer to the arguments of a call; errors are answers too."""
    try:
        return calculate(str(json.loads(arguments)["expression"]))
    except (CalculatorError, ValueError, KeyError, TypeError) as error:
        return f"error: {error}"


def reward(text: str, result: float) -> float:
    """1.0 when the last marked answer is the result (to 1 %), else 0.0."""
    marked = _ANSWER.findall(text)
    if not marked:
        return 0.0
    return float(abs(float(marked[-1].replace(",", "")) - result) <= _CLOSE * max(1.0, abs(result)))

"""Plain `openai`: the loop around the model is your own."""

from __future__ import annotations

import json

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

import agl_grpc
from examples.frameworks.weather import INSTRUCTIONS, Task, get_weather, score

MAX_TURNS = 4
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@agl_grpc.llm_rollout
def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answers a question; the reward is 1.0 or 0.0."""
    client = OpenAI(base_url=llm.endpoint, api_key=llm.api_key or "unused")
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": task["question"]},
    ]
    for _ in range(MAX_TURNS):
        completion = client.chat.completions.create(
            model=llm.model, messages=messages, tools=[TOOL], **llm.sampling_parameters
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return score(task, message.content)
        messages.append(message.to_dict())  # type: ignore[arg-type]  # the client's own form of a message
        for call in message.tool_calls:
            assert call.type == "function"
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return 0.0

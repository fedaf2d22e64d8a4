"""Microsoft Agent Framework."""

from __future__ import annotations

from agent_framework import Agent
from agent_framework.openai import OpenAIChatCompletionClient

import agl_grpc
from examples.frameworks.weather import INSTRUCTIONS, Task, get_weather, score


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answers a question; the reward is 1.0 or 0.0."""
    client = OpenAIChatCompletionClient(
        model=llm.model, base_url=llm.endpoint, api_key=llm.api_key or "unused"
    )
    helper = Agent(client, INSTRUCTIONS, name="weather", tools=[get_weather])
    answer = await helper.run(task["question"], options=llm.sampling_parameters)
    return score(task, answer.text)

"""OpenAI Agents SDK."""

from __future__ import annotations

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool
from openai import AsyncOpenAI

import agl_grpc
from examples.frameworks.weather import INSTRUCTIONS, Task, get_weather, score


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answers a question; the reward is 1.0 or 0.0."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key or "unused")
    helper = Agent(
        name="weather",
        instructions=INSTRUCTIONS,
        tools=[function_tool(get_weather)],
        model=OpenAIChatCompletionsModel(model=llm.model, openai_client=client),
        model_settings=ModelSettings(**llm.sampling_parameters),
    )
    # Traces of the SDK go to OpenAI, which knows nothing of this key.
    result = await Runner.run(helper, task["question"], run_config=RunConfig(tracing_disabled=True))
    return score(task, str(result.final_output))

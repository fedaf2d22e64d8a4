"""AutoGen (AgentChat)."""

from __future__ import annotations

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelFamily
from autogen_ext.models.openai import OpenAIChatCompletionClient

import agl_grpc
from examples.frameworks.weather import INSTRUCTIONS, Task, get_weather, score


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answers a question; the reward is 1.0 or 0.0."""
    client = OpenAIChatCompletionClient(
        model=llm.model,
        base_url=llm.endpoint,
        api_key=llm.api_key or "unused",
        # AutoGen knows what OpenAI's own models can do; of others it has to be told.
        model_info={
            "family": ModelFamily.UNKNOWN,
            "function_calling": True,
            "json_output": False,
            "structured_output": False,
            "vision": False,
        },
        **llm.sampling_parameters,
    )
    assistant = AssistantAgent(
        "weather",
        model_client=client,
        tools=[get_weather],
        system_message=INSTRUCTIONS,
        reflect_on_tool_use=True,
    )
    result = await assistant.run(task=task["question"])
    await client.close()
    return score(task, result.messages[-1].to_text())

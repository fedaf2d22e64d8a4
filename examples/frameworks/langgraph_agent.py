"""LangGraph with LangChain: an agent as a graph of model and tools."""

from __future__ import annotations

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

import agl_grpc
from examples.frameworks.weather import INSTRUCTIONS, Task, get_weather, score


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answers a question; the reward is 1.0 or 0.0."""
    model = ChatOpenAI(
        model=llm.model,
        base_url=llm.endpoint,
        api_key=SecretStr(llm.api_key or "unused"),
        **llm.sampling_parameters,
    )
    graph = create_agent(model, tools=[get_weather], system_prompt=INSTRUCTIONS)
    state = await graph.ainvoke({"messages": [{"role": "user", "content": task["question"]}]})
    return score(task, state["messages"][-1].text)

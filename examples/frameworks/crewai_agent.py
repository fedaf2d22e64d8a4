"""CrewAI."""

from __future__ import annotations

import os

# Before the import: it would send figures of its own use and offer to upload traces.
os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")

from crewai import LLM, Agent, Crew
from crewai import Task as Assignment
from crewai.tools import tool

import agl_grpc
from examples.frameworks.weather import INSTRUCTIONS, Task, get_weather, score


@agl_grpc.llm_rollout
async def agent(task: Task, llm: agl_grpc.LLM) -> float:
    """Answers a question; the reward is 1.0 or 0.0."""
    model = LLM(
        model=llm.model,
        provider="openai",
        base_url=llm.endpoint,
        api_key=llm.api_key or "unused",
        **llm.sampling_parameters,
    )
    forecaster = Agent(
        role="Forecaster",
        goal=INSTRUCTIONS,
        backstory="You know where to look.",
        llm=model,
        tools=[tool("get_weather")(get_weather)],
    )
    assignment = Assignment(
        description=task["question"], expected_output="One short sentence.", agent=forecaster
    )
    result = await Crew(agents=[forecaster], tasks=[assignment]).kickoff_async()
    return score(task, result.raw)

"""An agent that AgentOps records: its decorators, and openai as it instruments it."""

from __future__ import annotations

import asyncio
from typing import Any

from agl_grpc.agent import LitAgent


class TracedAgent(LitAgent[Any]):
    """Uses a tool of AgentOps and calls a model that is not there."""

    async def rollout_async(self, task: dict[str, Any], resources: Any, rollout: Any) -> float:
        import agentops
        import openai
        from agentops.sdk.decorators import tool

        @tool(name=f"tool-{task['number']}")
        async def double(number: int) -> int:
            await asyncio.sleep(0)
            return 2 * number

        agentops.init(api_key="00000000-0000-0000-0000-000000000000")
        async with openai.AsyncOpenAI(base_url=task["url"], api_key="x", max_retries=0) as engine:
            messages: Any = [{"role": "user", "content": str(task["number"])}]
            try:
                await engine.chat.completions.create(model="m", messages=messages)
            except openai.APIConnectionError:
                return float(await double(task["number"]))
        raise AssertionError("nobody listens there")

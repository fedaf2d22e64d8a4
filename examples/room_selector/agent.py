"""The agent: one question to a model, with the prompt that APO improves."""

from __future__ import annotations

import os
import re
from typing import Any

from openai import AsyncOpenAI

from agl_grpc import PromptTemplate, emit_message, prompt_rollout

FIRST = PromptTemplate(
    template="Choose a meeting room.\nRequest: {request}\nRooms:\n{rooms}\nEnd with: room: NAME"
)


@prompt_rollout
async def choose_room(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
    """1 for the right room. ``ROOMS_ENDPOINT`` and ``ROOMS_MODEL`` name the model that the agent uses."""
    prompt = prompt_template.format(request=task["request"], rooms=task["rooms"])
    emit_message(prompt)
    async with AsyncOpenAI(
        base_url=os.environ.get("ROOMS_ENDPOINT"), api_key=os.environ.get("OPENAI_API_KEY", "none")
    ) as client:
        reply = await client.chat.completions.create(
            model=os.environ.get("ROOMS_MODEL", "gpt-4.1-nano"),
            messages=[{"role": "user", "content": prompt}],
        )
    text = reply.choices[0].message.content or ""
    emit_message(f"The model said: {text}\nThe right room was {task['answer']}.")
    named = re.findall(r"room:\s*\**([A-H])\b", text, re.IGNORECASE)
    return float(bool(named) and named[-1].upper() == task["answer"])

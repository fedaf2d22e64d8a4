"""An agent that says what tokens its engine told it of, to be held against what was captured."""

from __future__ import annotations

import openai
import orjson

import agl_grpc


@agl_grpc.llm_rollout
async def agent(task: dict[str, int], llm: agl_grpc.LLM) -> float:
    """One short answer; the reward is the share of its characters that are lower-case letters."""
    question = f"say {task['number']}"
    async with openai.AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key or "none") as client:
        answer = await client.chat.completions.create(
            model=llm.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=12,
            extra_body={"return_token_ids": True},
            **llm.sampling_parameters,
        )
    told, choice = answer.model_dump(), answer.choices[0]
    ids = {"prompt": told["prompt_token_ids"], "sampled": told["choices"][0]["token_ids"]}
    agl_grpc.emit_message(orjson.dumps(ids).decode())
    text = choice.message.content or ""
    return sum("a" <= letter <= "z" for letter in text) / max(1, len(text))

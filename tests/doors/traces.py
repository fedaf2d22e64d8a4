"""Random traces as agents, frameworks and proxies leave them, in the JSON of Agent Lightning's spans."""

from __future__ import annotations

import random
from typing import Any

Json = dict[str, Any]

NAMES = ("openai.chat.completion", "step", "openai.chat.completion.create", "agent.run")
_BEGIN = 1_700_000_000.0
AGENTS = ("good one", "good two", "bad")


def trace(seed: int) -> list[Json]:
    """A trace of 1 to 25 spans."""
    chance = random.Random(seed)
    spans: list[Json] = []
    lost = f"{chance.getrandbits(64) | 1:016x}"
    for number in range(chance.randint(1, 25)):
        parent, first, last = None, 0, 4096
        if spans and chance.random() < 0.8:
            # What is done inside a span is done while it lasts; of others the original may lose some.
            around = chance.choice(spans)
            parent = around["span_id"]
            first, last = around["start_time"] - _BEGIN + 1, around["end_time"] - _BEGIN - 1
        elif number and chance.random() < 0.2:
            parent = lost
        if last - first < 4:
            continue
        # No two spans begin at the same time: whose turn it is then nobody says.
        start = chance.randrange(int(first), int(last) - 2) + number / 64
        end = start + chance.randrange(1, int(last - start) + 1) - 0.5
        spans.append(_span(chance, number, (_BEGIN + start, _BEGIN + end), parent))
    return spans


def _span(chance: random.Random, number: int, times: tuple[float, float], parent: str | None) -> Json:
    name, attributes = _contents(chance, number)
    return {
        "rollout_id": "ro-1",
        "attempt_id": "at-1",
        "sequence_id": chance.randint(1, 30),
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "span_id": f"{chance.getrandbits(64) | 1:016x}",
        "parent_id": parent,
        "name": name,
        "status": {"status_code": "OK", "description": None},
        "attributes": attributes,
        "events": [],
        "links": [],
        "start_time": times[0],
        "end_time": times[1],
        "context": None,
        "parent": None,
        "resource": {"attributes": {}, "schema_url": ""},
    }


def _contents(chance: random.Random, number: int) -> tuple[str, Json]:
    kind = chance.random()
    if kind < 0.25:
        key = chance.choice(("agentlightning.reward.0.value", "reward", "agentops.task.output"))
        value: Any = number / 8
        if key == "agentops.task.output":
            value = f'{{"type": "reward", "value": {value}}}'
        attributes = {key: value}
        if key.startswith("agentlightning"):
            attributes["agentlightning.reward.0.name"] = "primary"
        return "agentlightning.annotation", attributes
    if kind < 0.35:
        return "agent", {chance.choice(("agent.name", "executor.id")): chance.choice(AGENTS)}
    if kind < 0.4:
        operation = {"agentlightning.operation.name": "agentlightning.reward"}
        return "agentlightning.operation", operation
    if kind < 0.5:
        return _proxied(chance, number)
    name = chance.choice(NAMES)
    if not name.startswith("openai"):
        return name, {"n": number}
    return name, _call(chance, number)


def _proxied(chance: random.Random, number: int) -> tuple[str, Json]:
    if chance.random() < 0.5:
        ids = {"prompt_token_ids": [number], "response_token_ids": [number, 1]}
        return "litellm_request", ids if chance.random() < 0.8 else {}
    attributes: Json = {
        "llm.hosted_vllm.prompt_token_ids": f"[{number}, 2]",
        "llm.hosted_vllm.id": f"r{number % 5}",
    }
    if chance.random() < 0.5:
        attributes["llm.hosted_vllm.response_token_ids"] = f"[[{number}, 3]]"
    else:
        attributes["llm.hosted_vllm.choices"] = f"[{{'token_ids': [{number}, 4], 'text': None}}]"
    return "raw_gen_ai_request", attributes


def _call(chance: random.Random, number: int) -> Json:
    attributes: Json = {
        "gen_ai.prompt.0.role": "system",
        "gen_ai.prompt.0.content": "be kind",
        "gen_ai.prompt.1.role": "user",
        "gen_ai.prompt.1.content": f"question {number}",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.content": f"answer {number}",
        "gen_ai.request.model": "m",
        "gen_ai.request.temperature": 0.5,
    }
    if chance.random() < 0.6:
        attributes["gen_ai.response.id"] = f"chatcmpl-{number % 7}"
    if chance.random() < 0.6:
        attributes |= {"prompt_token_ids": [1, number], "response_token_ids": [number, 2]}
        attributes["logprobs.content"] = '[{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]'
    if chance.random() < 0.3:
        attributes["gen_ai.request.functions.0.name"] = "add"
        attributes["gen_ai.request.functions.0.description"] = "adds"
        attributes["gen_ai.request.functions.0.parameters"] = '{"type": "object"}'
    if chance.random() < 0.2:
        content = '[{"type": "text"}, {"type": "image_url", "image_url": {"url": "http://i"}}]'
        attributes["gen_ai.prompt.1.content"] = content
    return attributes

"""Traces as conversations in OpenAI's form, as fine-tuning takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agl_grpc.model.span import Span
from agl_grpc.sample.adapter.attributes import nested
from agl_grpc.sample.adapter.base import TraceAdapter, as_spans

_KEYS = ("gen_ai.prompt", "gen_ai.completion", "gen_ai.request", "gen_ai.response")


class TraceToMessages(TraceAdapter[list[dict[str, Any]]]):
    """For each span with a prompt or an answer in its ``gen_ai.*`` attributes one conversation.

    A conversation is ``{"messages": […], "tools": […] | None}`` with messages and tools in OpenAI's form.
    Tool calls of an answer are read from the spans right below it that have ``tool.*`` attributes.
    """

    def adapt(self, source: Sequence[Any], /) -> list[dict[str, Any]]:
        """The conversations, in the order of the spans.

        Raises `ValueError`, naming the span, when its messages are not a list or lack a role.
        """
        spans = as_spans(source)
        below: dict[str | None, list[Span]] = {}
        for span in spans:
            below.setdefault(span.parent_id, []).append(span)
        return [
            _conversation(span, below.get(span.span_id, []))
            for span in spans
            if any(name.startswith(tuple(f"{key}." for key in _KEYS)) for name in span.attributes)
        ]


def _conversation(span: Span, children: Sequence[Span]) -> dict[str, Any]:
    prompt, completion = _list_of(span, "gen_ai.prompt"), _list_of(span, "gen_ai.completion")
    request = nested(span.attributes, "gen_ai.request")
    calls = [_tool_call(tool) for child in children if (tool := nested(child.attributes, "tool"))]
    messages = [_message(span, message) for message in prompt]
    for answer in completion:
        if answer.get("role") != "assistant":
            continue
        message: dict[str, Any] = {"role": "assistant", "content": answer.get("content")}
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    functions = request.get("functions") if isinstance(request, Mapping) else None
    return {"messages": messages, "tools": _tools(functions)}


def _list_of(span: Span, key: str) -> list[dict[str, Any]]:
    found = nested(span.attributes, key)
    if not found:
        return []
    if isinstance(found, Mapping):
        # Some numbers are missing, or something else stands beside the messages.
        found = [found[name] for name in sorted((name for name in found if name.isdigit()), key=int)]
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"span {span.span_id} ({span.name}): {key} is no list of messages")
    return [dict(one) for one in found]


def _message(span: Span, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not role:
        raise ValueError(f"span {span.span_id} ({span.name}): a message of its prompt has no role")
    if role == "assistant" and "tool_calls" in message:
        calls = message["tool_calls"]
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                _function(call["id"], call["name"], call["arguments"])
                for call in (calls if isinstance(calls, list) else [])
            ],
        }
    made = {"role": role, "content": message.get("content", "")}
    if role == "tool":
        made["tool_call_id"] = message.get("tool_call_id", "")
    return made


def _tool_call(tool: Mapping[str, Any]) -> dict[str, Any]:
    call = tool.get("call") or {}
    return _function(call.get("id", ""), tool.get("name", ""), tool.get("parameters", ""))


def _function(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(functions: Any) -> list[dict[str, Any]] | None:
    if not isinstance(functions, list):
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": function["name"],
                "description": function.get("description", ""),
                "parameters": _parameters(function.get("parameters", {})),
            },
        }
        for function in functions
    ]


def _parameters(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value

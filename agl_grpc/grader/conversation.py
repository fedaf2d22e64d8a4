"""What was said in a model call, in OpenAI's form, whatever the dialect of its request and answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from agl_grpc.model.span import Span
from agl_grpc.model.value import RawPayload

Message = dict[str, Any]
Decode = Callable[[Sequence[int]], str]
"""Token ids to text, for calls of which only tokens were recorded."""


def conversation(spans: Sequence[Span], decode: Decode | None = None) -> list[Message]:
    """The messages of the attempt's last model call with its answer; empty when none can be read."""
    for span in reversed(spans):
        if messages := _of_span(span, decode):
            return messages
    return []


def _of_span(span: Span, decode: Decode | None) -> list[Message]:
    call = span.model_call
    if call is not None:
        answer = _answer(call.raw_response)
        if answer is None and decode is not None and call.choices:
            answer = {"role": "assistant", "content": decode(call.choices[0].token_ids.tolist())}
        if answer is not None:
            asked = _asked(call.raw_request)
            if not asked and decode is not None:
                asked = [{"role": "prompt", "content": decode(call.prompt_token_ids.tolist())}]
            return [*asked, answer]
    return _of_attributes(span.attributes)


def _asked(request: Any) -> list[Message]:
    """A request's messages: chat completions and Anthropic (`messages`), responses (`input`), completions."""
    if not isinstance(request, Mapping):
        return []
    system = request.get("system") or request.get("instructions")
    first: list[Message] = [{"role": "system", "content": text_of(system)}] if system else []
    said = request.get("messages", request.get("input", request.get("prompt")))
    if isinstance(said, str):
        return [*first, {"role": "user", "content": said}]
    return first + [dict(one) for one in said or () if isinstance(one, Mapping)]


def _answer(response: Any) -> Message | None:
    """The first answer of a response, streamed or whole; None when there is none."""
    if isinstance(response, RawPayload):
        return _streamed(response.data)
    if not isinstance(response, Mapping):
        return None
    if response.get("choices"):
        choice = response["choices"][0]
        message = choice.get("message")
        return (
            dict(message)
            if isinstance(message, Mapping)
            else {"role": "assistant", "content": choice.get("text", "")}
        )
    said = response.get("content", response.get("output"))  # Anthropic's messages, OpenAI's responses
    return None if said is None else {"role": "assistant", "content": text_of(said)}


def _streamed(data: bytes) -> Message | None:
    """The answer that a stream of server-sent events put together."""
    text: list[str] = []
    calls: dict[int, Message] = {}
    seen = False
    for line in data.split(b"\n"):
        if not line.startswith(b"data:"):
            continue
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:  # `[DONE]`, or a stream that was cut in the middle of an event
            continue
        if not isinstance(event, Mapping):
            continue
        seen = True
        choice: Mapping[str, Any] = next((c for c in event.get("choices") or () if not c.get("index")), {})
        delta = choice.get("delta") or event.get("delta")
        if isinstance(delta, str) and str(event.get("type", "")).endswith("output_text.delta"):
            text.append(delta)
        elif isinstance(delta, Mapping):
            text.append(delta.get("content") or delta.get("text") or "")
            for call in delta.get("tool_calls") or ():
                _add_call(calls, call)
        elif isinstance(choice.get("text"), str):
            text.append(choice["text"])
    if not seen:
        return None
    message: Message = {"role": "assistant", "content": "".join(text)}
    return message | ({"tool_calls": [calls[index] for index in sorted(calls)]} if calls else {})


def _add_call(calls: dict[int, Message], part: Mapping[str, Any]) -> None:
    function = part.get("function") or {}
    call = calls.setdefault(
        part.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["id"] = call["id"] or part.get("id") or ""
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _of_attributes(attributes: Mapping[str, Any]) -> list[Message]:
    """What tracers wrote by the GenAI conventions (`gen_ai.prompt.0.role`, `gen_ai.completion.0.content`)."""
    answers = _numbered(attributes, "gen_ai.completion")
    return [*_numbered(attributes, "gen_ai.prompt"), answers[0]] if answers else []


def _numbered(attributes: Mapping[str, Any], prefix: str) -> list[Message]:
    messages: list[Message] = []
    while True:
        place = f"{prefix}.{len(messages)}"
        role, content = attributes.get(f"{place}.role"), attributes.get(f"{place}.content")
        if role is None and content is None:
            return messages
        messages.append({"role": str(role or "assistant"), "content": content})


def text_of(content: Any) -> str:
    """The text of a message's content: itself, or the texts of its parts; what is no text is left out."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        return text_of(content.get("text", content.get("content", "")))
    if isinstance(content, Iterable):
        return "".join(text_of(part) for part in content)
    return ""

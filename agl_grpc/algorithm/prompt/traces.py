"""Finished rollouts as text, for a model that looks for what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from agl_grpc.model import Rollout, Span, semconv

_LONGEST_VALUE = 4000
_LONGEST_TRACE = 24_000
# Attributes in which tracers of the field put what went into a model and what came out.
_CONTENT_KEYS = ("gen_ai.", "llm.", "input.value", "output.value", "traceloop.entity.")


def describe(rollout: Rollout, spans: Sequence[Span], reward: float | None) -> str:
    """The task, what the agent did, and how it was judged, the latter two from the latest attempt's spans."""
    parts = [f"Task: {_text(rollout.input)}"]
    parts += [line for span in spans for line in _span_lines(span)]
    if rollout.failure is not None:
        parts.append(f"The agent failed: {rollout.failure.message}")
    parts.append(f"Reward: {'none was given' if reward is None else f'{reward:g}'}")
    return _cut("\n".join(parts), _LONGEST_TRACE)


def _span_lines(span: Span) -> Iterator[str]:
    attributes = span.attributes
    if semconv.MESSAGE_BODY in attributes:
        yield f"Message: {_text(attributes[semconv.MESSAGE_BODY])}"
    elif semconv.OBJECT_JSON in attributes or semconv.OBJECT_LITERAL in attributes:
        value = attributes.get(semconv.OBJECT_LITERAL, attributes.get(semconv.OBJECT_JSON))
        yield f"Object: {_text(value)}"
    elif semconv.EXCEPTION_MESSAGE in attributes:
        kind = attributes.get(semconv.EXCEPTION_TYPE, "exception")
        yield f"Exception: {kind}: {_text(attributes[semconv.EXCEPTION_MESSAGE])}"
    elif span.name == semconv.SPAN_OPERATION or semconv.OPERATION_NAME in attributes:
        yield from _operation(span)
    elif span.name == semconv.SPAN_ANNOTATION:
        noted = {k: v for k, v in attributes.items() if not k.startswith(semconv.REWARD)}
        if noted:
            yield f"Note: {_text(noted)}"
    elif span.model_call is not None and span.model_call.raw_request is not None:
        yield f"Model call: {_text(_messages(span.model_call.raw_request))}"
        yield f"Model answer: {_text(_answers(span.model_call.raw_response))}"
    else:
        content = {k: v for k, v in attributes.items() if k.startswith(_CONTENT_KEYS)}
        if content:
            yield f"{span.name}: {_text(content)}"


def _operation(span: Span) -> Iterator[str]:
    attributes = span.attributes
    name = attributes.get(semconv.OPERATION_NAME, span.name)
    for word, key in (("input", semconv.OPERATION_INPUT), ("output", semconv.OPERATION_OUTPUT)):
        found = {k: v for k, v in attributes.items() if k == key or k.startswith(f"{key}.")}
        if found:
            value = next(iter(found.values())) if len(found) == 1 else found
            yield f"Operation {name}, {word}: {_text(value)}"


def _messages(request: Any) -> Any:
    return request.get("messages", request.get("input", request)) if isinstance(request, Mapping) else request


def _answers(response: Any) -> Any:
    if isinstance(response, Mapping) and response.get("choices"):
        return [choice.get("message", choice.get("text", choice)) for choice in response["choices"]]
    return response


def _text(value: Any) -> str:
    if not isinstance(value, str):
        value = orjson.dumps(value, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    return _cut(value, _LONGEST_VALUE)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … ({len(text) - longest} characters left out) … {text[-half:]}"

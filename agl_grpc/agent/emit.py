"""What an agent may say about its rollout while it runs: rewards, messages, objects, exceptions, notes."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping
from typing import Any

from agl_grpc.agent.attributes import flatten
from agl_grpc.agent.context import needed_recorder
from agl_grpc.agent.target import SpanTarget, span_id_of
from agl_grpc.model import semconv
from agl_grpc.model.enums import StatusCode
from agl_grpc.model.failure import Failure, text_of
from agl_grpc.model.reward import NAME_BYTES, PRIMARY
from agl_grpc.model.span import SpanCoreFields, TraceStatus
from agl_grpc.model.value import encode_json


def emit_reward(
    reward: float | Mapping[str, float],
    *,
    primary_key: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    name: str | None = None,
    step: int | None = None,
    target: SpanTarget | None = None,
    propagate: bool = True,
) -> SpanCoreFields:
    """Judge the rollout: a finite number, or several by name, of which ``primary_key`` counts.

    ``name`` is for a single number that does not count, such as ``"style"``. ``step`` (from 0) judges one
    step only; ``target`` judges one span only: a span, an `operation`, or a span's hex id.
    ``propagate=False`` records nothing and only answers the span; otherwise there must be a rollout under
    way, else `RuntimeError`. Raises `TypeError` or `ValueError` for what is no reward.
    """
    values = _named_rewards(reward, primary_key, name)
    fields: dict[str, Any] = {}
    for place, (key, value) in enumerate(values.items()):
        fields[f"{semconv.REWARD}.{place}.name"] = key
        fields[f"{semconv.REWARD}.{place}.value"] = value
    if name not in (None, PRIMARY):
        fields[semconv.REWARD_IS_PRIMARY] = False
    if step is not None:
        fields[semconv.REWARD_STEP] = _step(step)
    if target is not None:
        fields[semconv.REWARD_TARGET] = span_id_of(target)
    return _emit("emit_reward", semconv.SPAN_ANNOTATION, {**(attributes or {}), **fields}, propagate)


def emit_annotation(annotation: Mapping[str, Any], propagate: bool = True) -> SpanCoreFields:
    """Note anything by name; nested mappings and lists become dotted names."""
    return _emit("emit_annotation", semconv.SPAN_ANNOTATION, annotation, propagate)


def emit_message(
    message: str, attributes: Mapping[str, Any] | None = None, propagate: bool = True
) -> SpanCoreFields:
    """Note a text."""
    if not isinstance(message, str):
        raise TypeError(f"message is a {type(message).__name__}; pass text, or use emit_object")
    fields = {**(attributes or {}), semconv.MESSAGE_BODY: message}
    return _emit("emit_message", semconv.SPAN_MESSAGE, fields, propagate)


def emit_object(
    object: Any, attributes: Mapping[str, Any] | None = None, propagate: bool = True
) -> SpanCoreFields:
    """Note a value: text, numbers and truth values as they are, bytes as base64, all else as JSON.

    Raises `TypeError` for what JSON cannot hold and `ValueError` for NaN and infinities inside it.
    """
    kind = f"{type(object).__module__}.{type(object).__qualname__}".removeprefix("builtins.")
    fields: dict[str, Any] = {**(attributes or {}), semconv.OBJECT_TYPE: kind}
    if isinstance(object, str | int | float | bool):
        fields[semconv.OBJECT_LITERAL] = object
    elif isinstance(object, bytes):
        fields[semconv.OBJECT_LITERAL] = base64.b64encode(object).decode()
    else:
        fields[semconv.OBJECT_JSON] = encode_json(object, "object").decode()
    return _emit("emit_object", semconv.SPAN_OBJECT, fields, propagate)


def emit_exception(
    exception: BaseException, attributes: Mapping[str, Any] | None = None, propagate: bool = True
) -> SpanCoreFields:
    """Note an exception with its traceback; the rollout goes on."""
    failure = Failure.from_exception(exception)
    fields = {
        **(attributes or {}),
        semconv.EXCEPTION_TYPE: failure.type,
        semconv.EXCEPTION_MESSAGE: text_of(exception),
        semconv.EXCEPTION_STACKTRACE: failure.detail,
    }
    return _emit("emit_exception", semconv.SPAN_EXCEPTION, fields, propagate)


def _emit(what: str, name: str, fields: Mapping[str, Any], propagate: bool) -> SpanCoreFields:
    now = time.time()
    span = SpanCoreFields(
        name=name,
        attributes=flatten(fields),
        status=TraceStatus(status_code=StatusCode.OK),
        start_time=now,
        end_time=now,
    )
    if propagate:
        needed_recorder(what).record(span)
    return span


def _named_rewards(
    reward: float | Mapping[str, float], primary_key: str | None, name: str | None
) -> dict[str, float]:
    if not isinstance(reward, Mapping):
        key = PRIMARY if name is None else _name(name)
        return {key: _finite(key, reward)}
    if name is not None:
        raise ValueError("name goes with a single number; several rewards have their names in the dict")
    if primary_key is None or primary_key not in reward:
        names = ", ".join(map(repr, reward))
        raise ValueError(
            f"primary_key is {primary_key!r}; it must name the reward that counts, one of: {names}"
        )
    first = {_name(primary_key): _finite(primary_key, reward[primary_key])}
    return first | {_name(key): _finite(key, value) for key, value in reward.items() if key != primary_key}


def _name(name: Any) -> str:
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= NAME_BYTES:
        raise ValueError(f"a reward is named {name!r}; names are texts of 1 to {NAME_BYTES} bytes")
    return name


def _step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**31:
        raise ValueError(f"step is {step!r}; steps are counted from 0")
    return step


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"reward {name!r} is a {type(value).__name__}; pass a number") from None
    if not math.isfinite(number):
        raise ValueError(f"reward {name!r} is {number}; it must be finite")
    return number

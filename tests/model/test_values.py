"""Python values cross into the contract and back without loss, or are refused by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agl_grpc.model.times import from_duration, from_timestamp, to_duration, to_timestamp
from agl_grpc.model.value import (
    BlobReference,
    RawPayload,
    from_any_value,
    from_key_values,
    from_payload,
    to_any_value,
    to_key_values,
    to_payload,
)
from agl_grpc.v1 import common_pb2

INT64 = st.integers(-(2**63), 2**63 - 1)
SCALARS = st.none() | st.booleans() | INT64 | st.floats(allow_nan=False) | st.text()
ANY = st.recursive(
    SCALARS | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def _same(left: Any, right: Any) -> bool:
    return bool(left == right) and type(left) is type(right)


@settings(max_examples=50)
@given(ANY)
def test_any_values_come_back(value: Any) -> None:
    message = common_pb2.AnyValue.FromString(to_any_value(value).SerializeToString())
    assert _same(from_any_value(message), value)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), ANY, max_size=5))
def test_named_values_keep_their_order(values: dict[str, Any]) -> None:
    back = from_key_values(to_key_values(values))
    assert list(back.items()) == list(values.items())


@settings(max_examples=50)
@given(JSON)
def test_payloads_come_back(value: Any) -> None:
    message = common_pb2.Payload.FromString(to_payload(value).SerializeToString())
    assert _same(from_payload(message), value)


@given(st.binary())
def test_bytes_stay_bytes(value: bytes) -> None:
    message = to_payload(value)
    assert message.media_type == "application/octet-stream"
    assert from_payload(message) == value


def test_blobs_and_foreign_media_types_come_back() -> None:
    for value in (BlobReference("sha256:" + "0" * 64), RawPayload("image/png", b"\x89PNG")):
        assert from_payload(to_payload(value)) == value


def test_numpy_values_are_plain_values() -> None:
    assert from_any_value(to_any_value(np.float32(0.5))) == 0.5
    assert from_payload(to_payload({"a": np.arange(3)})) == {"a": [0, 1, 2]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, [1, {"x": -math.inf}]])
def test_what_json_cannot_hold_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"input.* JSON cannot hold"):
        to_payload(bad)


def test_other_types_are_refused_with_their_place() -> None:
    with pytest.raises(TypeError, match=r"value\.a\[1\] is a object; allowed: None, bool"):
        to_any_value({"a": [1, object()]})
    with pytest.raises(TypeError, match="input is not JSON data"):
        to_payload(object())
    with pytest.raises(ValueError, match="does not fit 64 bits"):
        to_any_value(2**63)
    with pytest.raises(TypeError, match="keys must be text"):
        to_any_value({1: 2})


@given(st.floats(0, 4e9))
def test_times_keep_microseconds(seconds: float) -> None:
    message = to_timestamp(seconds)
    assert message is not None
    assert abs(from_timestamp(message) - seconds) <= 1e-6


@given(st.floats(-1e6, 1e6))
def test_durations_keep_nanoseconds(seconds: float) -> None:
    message = to_duration(seconds)
    assert message is not None
    assert abs(from_duration(message) - seconds) <= 1e-9
    assert message.seconds * message.nanos >= 0, "both parts have one sign"


def test_half_characters_are_kept_in_json_and_refused_elsewhere() -> None:
    half = {"text": "\ud83d", "fine": "\U0001f600"}
    assert from_payload(to_payload(half)) == half
    with pytest.raises(ValueError, match=r"value\.text is text with half a character"):
        to_any_value(half)

"""Python values in and out of the contract, without loss.

Attributes and notes travel as `AnyValue`; a task's input and an agent's output as `Payload`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from agl_grpc.v1 import common_pb2

try:
    import zstandard
except ImportError:  # an engine environment that was made before we needed it: payloads stay as they are
    zstandard = None  # type: ignore[assignment]

JSON = "application/json"
OCTETS = "application/octet-stream"
ZSTD_SUFFIX = "+zstd"
"""Ends the media type of data that is compressed with Zstandard."""

_of_thread = threading.local()

_LARGEST_UNPACKED = 256 * 1024 * 1024

_LONG_INTEGER = re.compile(rb"\d{19}")
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


@dataclass(slots=True, frozen=True)
class BlobReference:
    """Data that lies in the store as a blob.

    ``digest`` is ``sha256:<64 hex digits>``; ``media_type`` says what the bytes are.
    """

    digest: str
    media_type: str = JSON


@dataclass(slots=True, frozen=True)
class RawPayload:
    """Bytes with a media type that this library does not decode."""

    media_type: str
    data: bytes


def to_any_value(value: Any, path: str = "value") -> common_pb2.AnyValue:
    """Turn ``None``, bool, int, float, str, bytes, a list or a mapping into an `AnyValue`.

    Raises `ValueError` for integers beyond 64 bits and `TypeError` for other types; both name the place.
    """
    match value:
        case None:
            return common_pb2.AnyValue()
        case bool():
            return common_pb2.AnyValue(bool_value=value)
        case str():
            return _text(str(value), path)
        case int():
            if not _INT64_MIN <= value <= _INT64_MAX:
                raise ValueError(f"{path} is {value}, which does not fit 64 bits; pass it as text")
            return common_pb2.AnyValue(int_value=int(value))
        case float():
            return common_pb2.AnyValue(double_value=value)
        case bytes() | bytearray() | memoryview():
            return common_pb2.AnyValue(bytes_value=bytes(value))
        case Mapping():
            entries = to_key_values(value, path)
            return common_pb2.AnyValue(kvlist_value=common_pb2.KeyValueList(values=entries))
        case Sequence() | set() | frozenset():
            elements = [to_any_value(element, f"{path}[{i}]") for i, element in enumerate(value)]
            return common_pb2.AnyValue(array_value=common_pb2.ArrayValue(values=elements))
    scalar = getattr(value, "item", None)  # numpy scalars are plain values to their users
    if callable(scalar) and getattr(value, "shape", None) == ():
        return to_any_value(scalar(), path)
    kind = type(value).__name__
    raise TypeError(f"{path} is a {kind}; allowed: None, bool, int, float, str, bytes, list, dict")


def _text(value: str, path: str) -> common_pb2.AnyValue:
    try:
        return common_pb2.AnyValue(string_value=value)
    except UnicodeEncodeError:
        raise ValueError(f"{path} is text with half a character (a lone surrogate), not UTF-8") from None


def from_any_value(message: common_pb2.AnyValue) -> Any:
    """Turn an `AnyValue` into the Python value that it was made from."""
    # Most are texts; asking for the kind first would take as long again.
    text = message.string_value
    if text:
        return text
    kind = message.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [from_any_value(element) for element in message.array_value.values]
    if kind == "kvlist_value":
        return from_key_values(message.kvlist_value.values)
    return getattr(message, kind)


def to_key_values(values: Mapping[str, Any] | None, path: str = "value") -> list[common_pb2.KeyValue]:
    """Turn a mapping with text keys into named values, in its order."""
    if not values:
        return []
    for key in values:
        if not isinstance(key, str):
            raise TypeError(f"{path} has the key {key!r}; keys must be text")
    return [
        common_pb2.KeyValue(key=key, value=to_any_value(value, f"{path}.{key}"))
        for key, value in values.items()
    ]


def from_key_values(entries: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    """Turn named values into a dict; the last one of a repeated key wins."""
    return {entry.key: from_any_value(entry.value) for entry in entries}


def to_labels(labels: Mapping[str, str] | None) -> list[common_pb2.Label]:
    """Turn a mapping into labels."""
    return [common_pb2.Label(key=key, value=value) for key, value in (labels or {}).items()]


def from_labels(labels: Iterable[common_pb2.Label]) -> dict[str, str]:
    """Turn labels into a dict."""
    return {label.key: label.value for label in labels}


def to_payload(value: Any, path: str = "input") -> common_pb2.Payload:
    """Turn application data into a `Payload`: bytes stay bytes, all else becomes JSON.

    Raises `TypeError` for what JSON cannot hold and `ValueError` for NaN and infinities, naming the place.
    """
    match value:
        case BlobReference():
            return common_pb2.Payload(media_type=value.media_type, blob_digest=value.digest)
        case RawPayload():
            return common_pb2.Payload(media_type=value.media_type, data=value.data)
        case bytes() | bytearray() | memoryview():
            return common_pb2.Payload(media_type=OCTETS, data=bytes(value))
    return common_pb2.Payload(media_type=JSON, data=encode_json(value, path))


def from_payload(message: common_pb2.Payload) -> Any:
    """Turn a `Payload` into the value that it was made from; an empty one into ``None``.

    What says that it is JSON and is not stays a `RawPayload`: one such payload must not hide its neighbours.
    """
    kind = message.WhichOneof("content")
    media_type = message.media_type or JSON
    if kind is None:
        return None
    if kind == "blob_digest":
        return BlobReference(message.blob_digest, media_type)
    data = message.data
    if media_type.endswith(ZSTD_SUFFIX) and (unpacked := _unpack(data)) is not None:
        data, media_type = unpacked, media_type.removesuffix(ZSTD_SUFFIX)
    if media_type == OCTETS:
        return data
    if media_type == JSON:
        with contextlib.suppress(ValueError):
            return decode_json(data)
    return RawPayload(media_type, data)


def compressed(data: bytes) -> bytes | None:
    """The data compressed with Zstandard; None where that is not installed."""
    if zstandard is None:
        return None
    compressor = getattr(_of_thread, "compressor", None)
    if compressor is None:
        compressor = _of_thread.compressor = zstandard.ZstdCompressor(level=1)
    return bytes(compressor.compress(data))


def _unpack(data: bytes) -> bytes | None:
    """Compressed data as it was; None when it is damaged, states no size or one that is too large."""
    if zstandard is None:
        return None
    try:
        if not 0 < zstandard.frame_content_size(data) <= _LARGEST_UNPACKED:
            return None
        return zstandard.decompress(data)
    except zstandard.ZstdError:
        return None


def encode_json(value: Any, path: str = "value") -> bytes:
    """Encode a value as JSON that decodes to an equal value."""
    try:
        data = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        return _encode_slowly(value, path, error)
    if b"null" in data:  # orjson writes NaN as null: look only when there is a null at all
        _refuse_non_finite(value, path)
    return data


def decode_json(data: bytes) -> Any:
    """Decode JSON; integers of any size keep their value."""
    # orjson reads integers beyond 64 bits as floats, which the standard library does not.
    if _LONG_INTEGER.search(data):
        return json.loads(data)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:  # it refuses lone surrogates, which the standard library keeps
        return json.loads(data)


def _encode_slowly(value: Any, path: str, cause: TypeError) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except TypeError:
        raise TypeError(f"{path} is not JSON data: {cause}") from None
    except ValueError:
        raise ValueError(f"{path} holds NaN or an infinity, which JSON cannot hold") from None


def _refuse_non_finite(value: Any, path: str) -> None:
    match value:
        case float() if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which JSON cannot hold")
        case Mapping():
            for key, element in value.items():
                _refuse_non_finite(element, f"{path}.{key}")
        case list() | tuple():
            for i, element in enumerate(value):
                _refuse_non_finite(element, f"{path}[{i}]")

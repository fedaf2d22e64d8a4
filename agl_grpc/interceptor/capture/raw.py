"""Requests and answers as they came and went, packed for the contract."""

from __future__ import annotations

from agl_grpc.model.value import ZSTD_SUFFIX, compressed
from agl_grpc.v1 import common_pb2

_LIMIT = 1024 * 1024
"""The contract's limit of data in a message."""

_WORTH = 256


def raw_payload(data: bytes, media_type: str = "application/json") -> common_pb2.Payload | None:
    """The bytes as a payload, compressed where that helps; None when they are too many or there are none."""
    if not data:
        return None
    if len(data) >= _WORTH and (smaller := compressed(data)) is not None:
        data, media_type = smaller, media_type + ZSTD_SUFFIX
    if len(data) > _LIMIT:
        return None
    return common_pb2.Payload(media_type=media_type, data=data)

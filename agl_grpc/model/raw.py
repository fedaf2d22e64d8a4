"""Raw views: messages of the contract whose large parts stay the bytes that travelled.

On the wire a `repeated Span` looks as a `repeated bytes`, and a packed array of 32-bit numbers looks as
one `bytes`. The views here are the generated messages with such fields retyped, derived from the generated
descriptors when this module is imported, so they cannot drift from the contract. They let spans be stored
and answered as they came, and token arrays become numpy arrays without a copy:

    np.frombuffer(RawChoice.FromString(raw).token_ids, "<u4")

Every view keeps unknown fields, so parsing and serialising loses nothing. A writer may send packed arrays
in several pieces or unpacked, though none of the usual libraries does; `RawChoice` shows such an array as
too short. Compare with the generated message's length where it matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor

from agl_grpc.v1 import (
    batch_pb2,
    model_call_pb2,
    runner_service_pb2,
    span_pb2,
    store_service_pb2,
    trainer_service_pb2,
)

_PACKAGE = "agl_grpc.raw"
_FILE_NAME = "agl_grpc/model/raw.proto"
_FIELD = descriptor_pb2.FieldDescriptorProto

BYTES = ""
"""Target of a field that becomes bytes; other targets name a view."""

_VIEWS: Mapping[str, tuple[Descriptor, Mapping[str, str]]] = {
    "RawPromptTokens": (model_call_pb2.PromptTokens.DESCRIPTOR, {"token_ids": BYTES}),
    "RawChoice": (model_call_pb2.Choice.DESCRIPTOR, {"token_ids": BYTES, "logprobs": BYTES}),
    "RawModelCall": (
        model_call_pb2.ModelCall.DESCRIPTOR,
        {"prompt": "RawPromptTokens", "choices": "RawChoice"},
    ),
    "RawSpan": (span_pb2.Span.DESCRIPTOR, {"model_call": "RawModelCall"}),
    "RawAttemptSpans": (span_pb2.AttemptSpans.DESCRIPTOR, {"spans": BYTES}),
    "RawStoredSpan": (span_pb2.StoredSpan.DESCRIPTOR, {"span": BYTES}),
    "RawAppendSpansRequest": (
        store_service_pb2.AppendSpansRequest.DESCRIPTOR,
        {"groups": "RawAttemptSpans"},
    ),
    "RawSpanStreamMessage": (store_service_pb2.SpanStreamMessage.DESCRIPTOR, {"groups": "RawAttemptSpans"}),
    "RawStreamSpansRequest": (
        store_service_pb2.StreamSpansRequest.DESCRIPTOR,
        {"spans": "RawSpanStreamMessage"},
    ),
    "RawCompletion": (runner_service_pb2.Completion.DESCRIPTOR, {"spans": BYTES}),
    "RawCompleteAttemptsRequest": (
        runner_service_pb2.CompleteAttemptsRequest.DESCRIPTOR,
        {"completions": "RawCompletion"},
    ),
    "RawListSpansResponse": (store_service_pb2.ListSpansResponse.DESCRIPTOR, {"spans": "RawStoredSpan"}),
    "RawSampleColumns": (
        batch_pb2.SampleColumns.DESCRIPTOR,
        dict.fromkeys(
            (
                *("row_offsets", "prompt_lengths", "input_ids", "logprobs", "policy_versions", "rewards"),
                *("temperatures", "turn_offsets", "turn_choices", "turn_starts", "turn_ends"),
                *("turn_rewards", "turn_returns", "reward_values"),
            ),
            BYTES,
        ),
    ),
    "RawStreamBatchResponse": (
        trainer_service_pb2.StreamBatchResponse.DESCRIPTOR,
        {"samples": "RawSampleColumns"},
    ),
}

_HEADER_FIELDS = (
    *("trace_id", "span_id", "parent_span_id", "name", "start_time_unix_nano", "end_time_unix_nano"),
    *("explicit_sequence_id", "model_call"),
)


def _view(
    name: str, source: Descriptor, retyped: Mapping[str, str], package: str = _PACKAGE
) -> descriptor_pb2.DescriptorProto:
    view = descriptor_pb2.DescriptorProto()
    source.CopyToProto(view)
    view.name = name
    for field in view.field:
        if field.name in retyped:
            _retype(field, retyped[field.name], package)
    return view


def _retype(field: descriptor_pb2.FieldDescriptorProto, target: str, package: str) -> None:
    if target == BYTES:
        if field.type != _FIELD.TYPE_MESSAGE:
            # A packed array of numbers is one length-delimited value; an array of messages is many.
            field.label = _FIELD.LABEL_OPTIONAL
        field.type = _FIELD.TYPE_BYTES
        field.ClearField("type_name")
        field.ClearField("options")
    else:
        field.type_name = f".{package}.{target}"


def _header() -> descriptor_pb2.DescriptorProto:
    """A span of which only the keys are read; the rest is carried along unread."""
    view = _view("RawSpanKeys", span_pb2.Span.DESCRIPTOR, {"model_call": BYTES})
    kept = [field for field in view.field if field.name in _HEADER_FIELDS]
    del view.field[:]
    view.field.extend(kept)
    return view


Views = Mapping[str, tuple[Descriptor, Mapping[str, str]]]
"""Names of views, what each is a view of, and its retyped fields."""


def make_views(
    file_name: str, package: str, views: Views, also: Sequence[descriptor_pb2.DescriptorProto] = ()
) -> dict[str, Any]:
    """Message classes that are views of others.

    Args:
        file_name: A name that no other file of descriptors has.
        package: Of the views.
        views: What they are; a target that is `BYTES` makes bytes of a field.
        also: Further messages.
    """
    file = descriptor_pb2.FileDescriptorProto(name=file_name, package=package, syntax="proto3")
    sources = {source.file.name for source, _ in views.values()}
    for source, _ in views.values():
        sources.update(dependency.name for dependency in source.file.dependencies)
    file.dependency.extend(sorted(sources))
    for name, (source, retyped) in views.items():
        file.message_type.append(_view(name, source, retyped, package))
    file.message_type.extend(also)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    # Any: these classes exist only at run time; they have the attributes of the generated ones.
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{message.name}"))
        for message in file.message_type
    }


_CLASSES = make_views(_FILE_NAME, _PACKAGE, _VIEWS, [_header()])


def _message(name: str) -> Any:
    return _CLASSES[name]


RawPromptTokens = _message("RawPromptTokens")
"""PromptTokens with `token_ids` as little-endian bytes, 4 a token."""

RawChoice = _message("RawChoice")
"""Choice with `token_ids` and `logprobs` as little-endian bytes, 4 a token."""

RawModelCall = _message("RawModelCall")
"""ModelCall with raw prompt and choices."""

RawSpan = _message("RawSpan")
"""Span with a raw model call."""

RawSpanKeys = _message("RawSpanKeys")
"""Span of which only keys and times are read; `model_call` is its bytes (empty = none)."""

RawAttemptSpans = _message("RawAttemptSpans")
"""AttemptSpans with `spans` as a list of bytes."""

RawStoredSpan = _message("RawStoredSpan")
"""StoredSpan with `span` as bytes."""

RawAppendSpansRequest = _message("RawAppendSpansRequest")
"""AppendSpansRequest with raw groups."""

RawStreamSpansRequest = _message("RawStreamSpansRequest")
"""StreamSpansRequest with raw groups."""

RawSpanStreamMessage = _message("RawSpanStreamMessage")
"""SpanStreamMessage with raw groups."""

RawCompletion = _message("RawCompletion")
"""Completion with `spans` as a list of bytes."""

RawCompleteAttemptsRequest = _message("RawCompleteAttemptsRequest")
"""CompleteAttemptsRequest with raw completions."""

RawListSpansResponse = _message("RawListSpansResponse")
"""ListSpansResponse with raw stored spans."""

RawSampleColumns = _message("RawSampleColumns")
"""SampleColumns with its packed columns as little-endian bytes."""

RawStreamBatchResponse = _message("RawStreamBatchResponse")
"""StreamBatchResponse, and with the same fields ReplayBatchResponse, with raw columns."""

"""The contract's own promises, read from its descriptors: names, keys, paging, presence, wire forms."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, MethodDescriptor
from opentelemetry.proto.trace.v1 import trace_pb2

import agl_grpc.v1
from agl_grpc.v1 import error_reason_pb2, span_pb2

PROTO = Path(__file__).parents[2] / "proto" / "agl_grpc" / "v1"
READS = ("Get", "List", "Watch", "Wait", "Export", "Stream", "Explain", "Replay")
# Appends are deduplicated by their natural key (R14), blobs by their hash.
# IssueCredential stores nothing.
NATURALLY_IDEMPOTENT = {"AppendSpans", "PutBlob", "RenewLeases", "Heartbeat", "IssueCredential"}


def files() -> list[FileDescriptor]:
    names = [module.name for module in pkgutil.iter_modules(agl_grpc.v1.__path__)]
    return [
        importlib.import_module(f"agl_grpc.v1.{name}").DESCRIPTOR for name in names if name.endswith("_pb2")
    ]


def messages() -> Iterator[Descriptor]:
    for file in files():
        yield from file.message_types_by_name.values()


def methods() -> list[MethodDescriptor]:
    found = [m for f in files() for s in f.services_by_name.values() for m in s.methods]
    assert len(found) > 60
    return found


def test_every_proto_file_has_its_stubs() -> None:
    assert sorted(file.name for file in files()) == sorted(
        f"agl_grpc/v1/{p.name}" for p in PROTO.glob("*.proto")
    )


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_rpc_has_its_own_request_and_response(method: MethodDescriptor) -> None:
    assert method.input_type.name == f"{method.name}Request"
    assert method.output_type.name == f"{method.name}Response"


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_mutations_take_a_request_id(method: MethodDescriptor) -> None:
    if method.name.startswith(READS) or method.name in NATURALLY_IDEMPOTENT:
        return
    field = method.input_type.fields_by_name["request_id"]
    assert field.type == FieldDescriptor.TYPE_STRING


@pytest.mark.parametrize("method", [m for m in methods() if m.name.startswith("List")], ids=lambda m: m.name)
def test_lists_are_paged_by_token(method: MethodDescriptor) -> None:
    assert {"page_size", "page_token"} <= set(method.input_type.fields_by_name)
    assert "next_page_token" in method.output_type.fields_by_name


@pytest.mark.parametrize(
    "method",
    [m for m in methods() if m.name.startswith("Watch") and m.name != "WatchTrainingRun"],
    ids=lambda m: m.name,
)
def test_watches_resume_from_a_cursor(method: MethodDescriptor) -> None:
    assert method.server_streaming
    assert "cursor" in method.input_type.fields_by_name
    assert {"cursor", "checkpoint"} <= set(method.output_type.fields_by_name)


@pytest.mark.parametrize(
    "method", [m for m in methods() if m.name.startswith("Update")], ids=lambda m: m.name
)
def test_updates_take_a_field_mask(method: MethodDescriptor) -> None:
    assert (
        method.input_type.fields_by_name["update_mask"].message_type.full_name == "google.protobuf.FieldMask"
    )


def test_no_map_fields_so_that_stored_bytes_are_canonical() -> None:
    maps = [
        f.full_name
        for m in messages()
        for f in m.fields
        if f.message_type and f.message_type.GetOptions().map_entry
    ]
    assert maps == []


def test_numbers_whose_zero_is_a_value_know_presence() -> None:
    for message in messages():
        if message.name in {"Reward", "ManifestEntry"}:
            field = message.fields_by_name["value" if message.name == "Reward" else "reward"]
            assert field.has_presence


def test_every_error_reason_has_an_example() -> None:
    text = (PROTO / "error_reason.proto").read_text()
    for name, value in error_reason_pb2.ErrorReason.items():
        if value == 0:
            continue
        comment = text[: text.index(f"{name} =")].rsplit(";", 1)[-1]
        example = re.search(r'\{"reason":"([A-Z_]+)"', comment)
        assert example, f"{name} has no example"
        assert f"ERROR_REASON_{example.group(1)}" == name


def test_every_error_reason_is_named_where_it_comes_from() -> None:
    """By the comment of a service, an rpc, a message or a field, not only by the list of reasons."""
    paths = [path for path in PROTO.glob("*.proto") if path.name != "error_reason.proto"]
    text = "\n".join(line for path in paths for line in path.read_text().splitlines() if "//" in line)
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", text))
    reasons = {name.removeprefix("ERROR_REASON_") for name, _ in error_reason_pb2.ErrorReason.items()}
    assert reasons - named == {"UNSPECIFIED"}


def test_every_refusal_of_the_store_has_a_reason_of_the_contract() -> None:
    """And the other way round: no reason is left over that nothing answers."""
    source = (PROTO.parents[2] / "agl_grpc" / "store" / "errors.py").read_text()
    raised = set(re.findall(r"error_reason_pb2\.(ERROR_REASON_[A-Z_]+)", source))
    assert raised == set(error_reason_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}


def test_an_otlp_span_is_a_span_byte_for_byte() -> None:
    theirs = trace_pb2.Span(
        trace_id=bytes(range(16)),
        span_id=bytes(range(8)),
        trace_state="a=b",
        parent_span_id=bytes(8),
        name="chat",
        kind=trace_pb2.Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=1_700_000_000_000_000_000,
        end_time_unix_nano=1_700_000_000_000_000_001,
        dropped_attributes_count=1,
        status=trace_pb2.Status(message="no", code=trace_pb2.Status.STATUS_CODE_ERROR),
        flags=256,
    )
    attribute = theirs.attributes.add(key="k")
    for element in ("x", "y"):
        attribute.value.array_value.values.add(string_value=element)
    theirs.events.add(name="e", time_unix_nano=5).attributes.add(key="n").value.int_value = -3
    theirs.links.add(trace_id=bytes(16), span_id=b"12345678", flags=1)
    wire = theirs.SerializeToString(deterministic=True)

    ours = span_pb2.Span.FromString(wire)

    assert ours.SerializeToString(deterministic=True) == wire
    assert (ours.name, ours.kind, ours.status.code) == ("chat", span_pb2.SPAN_KIND_CLIENT, 2)
    assert ours.attributes[0].value.array_value.values[1].string_value == "y"
    assert ours.events[0].attributes[0].value.int_value == -3
    assert not list(ours.DESCRIPTOR.oneofs)
    assert {f.number for f in ours.DESCRIPTOR.fields if f.number < 100} == set(range(1, 17))

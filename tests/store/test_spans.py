"""Spans through a real server: keys, numbers, refusals, model calls, prompts as differences, lists."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from agl_grpc.model import raw
from agl_grpc.store.door.app import StoreServer
from agl_grpc.v1 import (
    attempt_pb2,
    error_reason_pb2,
    model_call_pb2,
    span_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
)
from tests.store.span_support import (
    append,
    call_span,
    group,
    listed,
    make_attempts,
    reason_of,
    serving,
    span,
)

if TYPE_CHECKING:
    from tests.store.span_support import Stub


@pytest.fixture
async def served(database: Path | str | None) -> AsyncIterator[tuple[StoreServer, Stub]]:
    async with serving(database) as (server, channel):
        await make_attempts(server, "1", "2")
        yield server, store_service_pb2_grpc.StoreServiceStub(channel)


async def test_stored_bytes_come_back_as_they_were_sent(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    # Field 2000 is unknown to the contract: it must survive, whatever a later version puts there.
    sent = span("one").SerializeToString() + b"\x82\x7d\x03abc"
    request = raw.RawAppendSpansRequest()
    request.groups.add(rollout_id="ro-1", attempt_id="at-1", spans=[sent])
    answer = await stub.AppendSpans(
        store_service_pb2.AppendSpansRequest.FromString(request.SerializeToString())
    )
    assert (answer.stored, answer.duplicates, len(answer.rejected)) == (1, 0, 0)
    (stored,) = await listed(stub, "1")
    assert stored.span.SerializeToString() == sent
    assert (stored.rollout_id, stored.attempt_id, stored.sequence_id) == ("ro-1", "at-1", 1)
    assert not stored.late
    assert abs(stored.received_time.seconds - time.time()) < 60


async def test_an_answer_is_what_protobuf_would_write(database: Path | str | None) -> None:
    async with serving(database) as (server, channel):
        await make_attempts(server, "1")
        stub: Stub = store_service_pb2_grpc.StoreServiceStub(channel)
        # Lengths around those at which a length takes another byte, and sequence ids likewise.
        long = [span("x" * size, explicit_sequence_id=size) for size in (1, 90, 127, 128, 1000)]
        await append(stub, group("1", *long))
        request = store_service_pb2.UpdateAttemptRequest()
        request.attempt.rollout_id, request.attempt.attempt_id = "ro-1", "at-1"
        request.attempt.status = attempt_pb2.ATTEMPT_STATUS_SUCCEEDED
        request.update_mask.paths.append("status")
        await stub.UpdateAttempt(request)
        await append(stub, group("1", span("late"), span("large", trace_state="y" * 20_000)))
        method = channel.unary_unary("/agl_grpc.v1.StoreService/ListSpans")
        for size in (3, 10):
            wanted = store_service_pb2.ListSpansRequest(rollout_id="ro-1", page_size=size, include_total=True)
            answer: bytes = await method(wanted.SerializeToString())
            read = store_service_pb2.ListSpansResponse.FromString(answer)
            assert read.SerializeToString() == answer
            assert (len(read.spans), read.total_size) == (min(size, 7), 7)
        assert [one.late for one in read.spans] == [False] * 5 + [True] * 2


async def test_a_repeat_is_counted_and_not_stored_twice(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    one, two = span("one"), span("two")
    assert (await append(stub, group("1", one, two, one))).sequence_ids == [1, 2, 1]
    again = await append(stub, group("1", two, span("three")), group("2", one))
    assert (again.stored, again.duplicates, list(again.sequence_ids)) == (2, 1, [2, 3, 1])
    assert [stored.span.name for stored in await listed(stub, "1")] == ["one", "two", "three"]


async def test_explicit_sequence_ids_raise_the_counter_and_may_repeat(
    served: tuple[StoreServer, Stub],
) -> None:
    _, stub = served
    five = [span("a", explicit_sequence_id=5), span("b", explicit_sequence_id=5), span("c")]
    assert (await append(stub, group("1", *five))).sequence_ids == [5, 5, 6]
    low = await append(stub, group("1", span("d", explicit_sequence_id=2), span("e")))
    assert low.sequence_ids == [2, 7]
    reserved = await stub.ReserveSpanSequences(
        store_service_pb2.ReserveSpanSequencesRequest(
            keys=[store_service_pb2.SpanSequenceKey(rollout_id="ro-1", attempt_id="at-1")] * 2
        )
    )
    assert reserved.sequence_ids == [8, 9]
    assert (await append(stub, group("1", span("f")))).sequence_ids == [10]


async def test_bad_spans_are_rejected_alone_and_move_no_counter(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    day = 24 * 3600 * 10**9
    bad = [
        (span("x", span_id=b"short"), "span_id"),
        (span("x", span_id=bytes(8)), "span_id"),
        (span(""), "name"),
        (span("x" * 1025), "name"),
        (span("x", start_time_unix_nano=time.time_ns() + day + 10**10), "start_time_unix_nano"),
        (span("x", start_time_unix_nano=2**64 - 1), "start_time_unix_nano"),
        (span("x", end_time_unix_nano=1), "end_time_unix_nano"),
        (span("x", parent_span_id=b"123"), "parent_span_id"),
        (span("x", trace_id=b"123"), "trace_id"),
        (span("x", explicit_sequence_id=-1), "explicit_sequence_id"),
        (span("x", attributes=[{"key": "k"}] * 1025), "attributes"),
    ]
    bad[0][0].span_id = b"short"
    bad[1][0].span_id = bytes(8)
    bad[2][0].name = ""
    answer = await append(stub, group("1", span("good"), *(one for one, _ in bad), span("also")))
    assert answer.stored == 2
    assert [answer.sequence_ids[0], answer.sequence_ids[-1]] == [1, 2]
    assert set(answer.sequence_ids[1:-1]) == {0}
    for place, ((sent, field), rejected) in enumerate(zip(bad, answer.rejected, strict=True), start=1):
        assert (rejected.group_index, rejected.index, rejected.span_id) == (0, place, sent.span_id)
        assert rejected.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert rejected.status.reason == error_reason_pb2.ERROR_REASON_INVALID_FIELD
        paths = {label.key: label.value for label in rejected.status.metadata}
        assert paths["field"] == f"groups[0].spans[{place}].{field}"
        assert rejected.status.message.startswith(f"groups[0].spans[{place}].{field} ")


async def test_bytes_that_are_no_span_are_rejected_alone(served: tuple[StoreServer, Stub]) -> None:
    server, _ = served
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    chance = random.Random(seed)
    good = [span(f"good {number}").SerializeToString() for number in range(20)]
    broken = [chance.randbytes(chance.randrange(1, 60)) for _ in range(200)]
    broken += [one[:-1] for one in good] + [one.replace(b"good", b"\xff\xfe\xfd\xfc") for one in good]
    everything = good + broken
    chance.shuffle(everything)
    request = raw.RawAppendSpansRequest()
    request.groups.add(rollout_id="ro-1", attempt_id="at-1", spans=everything)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/agl_grpc.v1.StoreService/AppendSpans")
        answer = store_service_pb2.AppendSpansResponse.FromString(await call(request.SerializeToString()))
        assert answer.stored == 20
        assert answer.stored + len(answer.rejected) == len(everything)
        names = {
            stored.span.name for stored in await listed(store_service_pb2_grpc.StoreServiceStub(channel), "1")
        }
        assert names == {f"good {number}" for number in range(20)}
        for method in ("AppendSpans", "ListSpans", "PutRewards"):
            call = channel.unary_unary(f"/agl_grpc.v1.StoreService/{method}")
            for _ in range(20):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(b"\xff" + chance.randbytes(30))
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert reason_of(caught.value) == "INVALID_FIELD"


async def test_spans_of_unknown_attempts_are_rejected(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    wrong = span_pb2.AttemptSpans(rollout_id="ro-2", attempt_id="at-1", spans=[span()])
    nameless = span_pb2.AttemptSpans(rollout_id="ro-1", spans=[span()])
    answer = await append(stub, group("9", span(), span()), wrong, nameless, group("1", span()))
    assert (answer.stored, list(answer.sequence_ids)) == (1, [0, 0, 0, 0, 1])
    reasons = [(one.group_index, one.index, one.status.reason) for one in answer.rejected]
    unknown = error_reason_pb2.ERROR_REASON_ENTITY_NOT_FOUND
    assert reasons == [
        (0, -1, unknown),
        (1, -1, unknown),
        (2, -1, error_reason_pb2.ERROR_REASON_INVALID_FIELD),
    ]


def broken_calls() -> list[tuple[str, span_pb2.Span]]:
    short, nan, infinite, gap, beyond = (call_span([1, 2], [3, 4, 5]) for _ in range(5))
    short.model_call.choices[0].logprobs.pop()
    nan.model_call.choices[0].logprobs[1] = float("nan")
    infinite.model_call.choices[0].logprobs[2] = float("-inf")
    gap.model_call.choices[0].policy_runs[0].start = 1
    beyond.model_call.choices[0].policy_runs[0].end = 4
    return [
        ("model_call.choices[0].logprobs", short),
        ("model_call.choices[0].logprobs[1]", nan),
        ("model_call.choices[0].logprobs[2]", infinite),
        ("model_call.choices[0].policy_runs[0]", gap),
        ("model_call.choices[0].policy_runs", beyond),
    ]


async def test_malformed_tokens_name_field_and_span(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    bad = broken_calls()
    good = [call_span([1], [2]), call_span([3], [])]
    answer = await append(stub, group("1", good[0], *(one for _, one in bad), good[1]))
    assert answer.stored == 2
    for place, ((field, sent), rejected) in enumerate(zip(bad, answer.rejected, strict=True), start=1):
        assert rejected.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert rejected.status.reason == error_reason_pb2.ERROR_REASON_TOKENS_MALFORMED
        details = {label.key: label.value for label in rejected.status.metadata}
        assert details == {"field": f"groups[0].spans[{place}].{field}", "span_id": sent.span_id.hex()}
    assert [stored.span.span_id for stored in await listed(stub, "1")] == [one.span_id for one in good]


async def test_unpacked_arrays_are_checked_and_brought_into_packed_form(
    served: tuple[StoreServer, Stub],
) -> None:
    server, stub = served

    def unpacked(logprobs: list[float]) -> bytes:
        # choices { token_ids: 5 (unpacked) token_ids: 6 logprobs: ... } as another encoder may write it
        choice = b"".join(b"\x15" + struct.pack("<I", token) for token in (5, 6))
        choice += b"".join(b"\x1d" + struct.pack("<f", value) for value in logprobs)
        call = b"\x1a" + bytes([len(choice)]) + choice
        return span("odd").SerializeToString() + b"\xba\x06" + bytes([len(call)]) + call

    request = raw.RawAppendSpansRequest()
    request.groups.add(
        rollout_id="ro-1",
        attempt_id="at-1",
        spans=[unpacked([-1.0, -2.0]), unpacked([-1.0]), unpacked([-1.0, float("nan")])],
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/agl_grpc.v1.StoreService/AppendSpans")
        answer = store_service_pb2.AppendSpansResponse.FromString(await call(request.SerializeToString()))
    assert answer.stored == 1
    assert {one.status.reason for one in answer.rejected} == {error_reason_pb2.ERROR_REASON_TOKENS_MALFORMED}
    (stored,) = await listed(stub, "1")
    view = raw.RawSpan.FromString(stored.span.SerializeToString())
    assert view.model_call.choices[0].token_ids == struct.pack("<II", 5, 6)
    assert view.model_call.choices[0].logprobs == struct.pack("<ff", -1.0, -2.0)


async def test_readers_get_whole_prompts(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    first = call_span([1, 2, 3], [4, 5])
    second = call_span([6, 7], [8], base=first.span_id, base_length=5)
    cut = call_span([9], [10], base=second.span_id, base_length=4)
    third = call_span([11], [12], base=second.span_id, base_length=8)
    assert (await append(stub, group("1", first, second))).stored == 2
    assert (await append(stub, group("1", cut, third))).stored == 2
    stored = {one.span.span_id: one.span.model_call for one in await listed(stub, "1")}
    assert list(stored[second.span_id].prompt.token_ids) == [1, 2, 3, 4, 5, 6, 7]
    assert list(stored[cut.span_id].prompt.token_ids) == [1, 2, 3, 4, 9]
    assert list(stored[third.span_id].prompt.token_ids) == [1, 2, 3, 4, 5, 6, 7, 8, 11]
    assert all(not call.prompt.base_span_id and not call.prompt.base_length for call in stored.values())
    # Alone on its page, a prompt is put together from rows that are not on it.
    request = store_service_pb2.ListSpansRequest(rollout_id="ro-1", page_size=1, order=2)
    (alone,) = (await stub.ListSpans(request)).spans
    assert list(alone.span.model_call.prompt.token_ids) == [1, 2, 3, 4, 5, 6, 7, 8, 11]
    assert alone.span.model_call.choices[0].policy_runs[0].policy_version == 7
    (bare,) = (
        await stub.ListSpans(
            store_service_pb2.ListSpansRequest(rollout_id="ro-1", page_size=1, omit_tokens=True)
        )
    ).spans
    assert not bare.span.model_call.prompt.token_ids
    assert not bare.span.model_call.choices[0].token_ids
    assert bare.span.model_call.choices[0].finish_reason == "stop"


async def test_a_prompt_without_its_base_is_rejected(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    base = call_span([1, 2], [3])
    plain = span("not a call")
    bad_base = broken_calls()[0][1]
    other = call_span([1, 2], [3])
    await append(stub, group("1", plain), group("2", other))
    orphans = [
        call_span([9], [9], base=os.urandom(8), base_length=1),
        call_span([9], [9], base=plain.span_id, base_length=1),
        call_span([9], [9], base=bad_base.span_id, base_length=1),
        call_span([9], [9], base=other.span_id, base_length=1),
        call_span([9], [9], base=base.span_id, base_length=4),
    ]
    child = call_span([9], [9], base=orphans[0].span_id, base_length=1)
    answer = await append(stub, group("1", bad_base, base, *orphans, child))
    assert answer.stored == 1
    refused = {
        rejected.span_id: (rejected.status.reason, {x.key: x.value for x in rejected.status.metadata})
        for rejected in answer.rejected[1:]
    }
    for orphan in [*orphans, child]:
        reason, details = refused[orphan.span_id]
        assert reason == error_reason_pb2.ERROR_REASON_DELTA_BASE_UNKNOWN
        assert details == {"base_span_id": orphan.model_call.prompt.base_span_id.hex()}
    # Sent in full it is welcome.
    assert (await append(stub, group("1", call_span([1, 9], [9], span_id=child.span_id)))).stored == 1


async def test_lists_filter_sort_and_page(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    parent = os.urandom(8)
    spans = [
        span(
            f"name {number % 3}",
            bytes([number + 1]) * 8,
            start_time_unix_nano=1000 - number,
            end_time_unix_nano=5000,
            parent_span_id=parent if number % 2 else b"",
        )
        for number in range(10)
    ]
    await append(stub, group("1", *spans, call_span([1], [2], span_id=b"callcall")))

    async def ids(**fields: object) -> list[bytes]:
        return [stored.span.span_id for stored in await listed(stub, "1", **fields)]

    want = store_service_pb2.SpanFilter
    every = [one.span_id for one in spans] + [b"callcall"]
    assert await ids(page_size=3) == every
    assert await ids(page_size=3, order=2) == every[::-1]
    assert await ids(page_size=4, order_by="start_time") == [*every[9::-1], b"callcall"]
    assert await ids(page_size=4, order_by="span_id", order=2) == [b"callcall", *every[9::-1]]
    assert await ids(filter=want(name="name 1"), page_size=1) == [every[1], every[4], every[7]]
    assert await ids(filter=want(name_contains="me 2")) == [every[2], every[5], every[8]]
    assert await ids(filter=want(model_calls_only=True)) == [b"callcall"]
    assert await ids(filter=want(span_id_contains="0a0A")) == [every[9]]
    both = want(name="name 1", parent_span_id=parent, logic=2)
    assert await ids(filter=both) == [every[place] for place in (1, 3, 4, 5, 7, 9)]
    assert (await ids(order_by="parent_id"))[:5] == [every[place] for place in (1, 3, 5, 7, 9)]
    assert await ids(skip=9) == every[9:]
    assert await ids(attempt_id="latest", skip=9) == every[9:]
    counted = await stub.ListSpans(
        store_service_pb2.ListSpansRequest(
            rollout_id="ro-1", include_total=True, page_size=1, filter=want(name="name 1")
        )
    )
    assert counted.total_size == 3
    assert await listed(stub, "2") == []


async def test_wrong_lists_are_refused(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    await append(stub, group("1", *(span(f"s{number}") for number in range(3))))
    page = await stub.ListSpans(store_service_pb2.ListSpansRequest(rollout_id="ro-1", page_size=1))
    wrong = [
        ({"rollout_id": "ro-9"}, "ENTITY_NOT_FOUND"),
        ({"rollout_id": "ro-1", "attempt_id": "at-2"}, "ENTITY_NOT_FOUND"),
        ({"rollout_id": ""}, "INVALID_FIELD"),
        ({"rollout_id": "ro-1", "order_by": "colour"}, "INVALID_FIELD"),
        ({"rollout_id": "ro-1", "page_size": -1}, "INVALID_FIELD"),
        ({"rollout_id": "ro-1", "skip": -1}, "INVALID_FIELD"),
        ({"rollout_id": "ro-1", "page_token": "@"}, "PAGE_TOKEN_INVALID"),
        ({"rollout_id": "ro-2", "page_token": page.next_page_token}, "PAGE_TOKEN_INVALID"),
        ({"rollout_id": "ro-1", "order": 2, "page_token": page.next_page_token}, "PAGE_TOKEN_INVALID"),
    ]
    for fields, reason in wrong:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListSpans(store_service_pb2.ListSpansRequest(**fields))
        assert reason_of(caught.value) == reason, fields


async def test_exports_resume_by_cursor(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    first = [call_span([number], [number]) for number in range(700)]
    await append(stub, group("1", *first), group("2", span("plain")))
    pages = [page async for page in stub.ExportSpans(store_service_pb2.ExportSpansRequest())]
    assert len(pages) > 1
    everything = [one.span.span_id for page in pages for one in page.spans]
    assert everything[:700] == [one.span_id for one in first]
    assert len(everything) == 701
    rest = store_service_pb2.ExportSpansRequest(cursor=pages[0].cursor, model_calls_only=True)
    resumed = [one.span.span_id async for page in stub.ExportSpans(rest) for one in page.spans]
    assert resumed == everything[len(pages[0].spans) : 700]
    other = store_service_pb2.ExportSpansRequest(rollout_ids=["ro-2"])
    assert [len(page.spans) async for page in stub.ExportSpans(other)] == [1]
    sealed = store_service_pb2.ExportSpansRequest(sealed_only=True)
    assert [page async for page in stub.ExportSpans(sealed)] == []


async def test_watchers_see_spans_as_they_arrive_and_resume(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    watch = stub.WatchSpans(store_service_pb2.WatchSpansRequest())
    seen: list[bytes] = []
    cursors: list[int] = []
    begun = asyncio.Event()

    async def follow() -> None:
        async for answer in watch:
            begun.set()
            seen.extend(one.span.span_id for one in answer.spans)
            if answer.spans:
                cursors.append(answer.cursor)
            if len(seen) >= 1500:
                return

    following = asyncio.create_task(follow())
    await asyncio.wait_for(begun.wait(), 10)
    sent = [span(f"s{number}") for number in range(1500)]
    for start in range(0, 1500, 300):
        await append(stub, group("1", *sent[start : start + 300]))
    await asyncio.wait_for(following, 10)
    assert seen == [one.span_id for one in sent]
    watch.cancel()
    again = stub.WatchSpans(store_service_pb2.WatchSpansRequest(cursor=cursors[0], rollout_ids=["ro-1"]))
    tail: list[bytes] = []
    async for answer in again:
        tail.extend(one.span.span_id for one in answer.spans)
        if answer.cursor >= cursors[-1]:
            break
    again.cancel()
    assert tail[-300:] == seen[-300:]
    assert len(tail) == len(set(tail))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.WatchSpans(store_service_pb2.WatchSpansRequest(cursor=10**9)):
            pass
    assert reason_of(caught.value) == "CURSOR_COMPACTED"


async def test_choices_index_out_of_base_is_rejected_not_fatal(served: tuple[StoreServer, Stub]) -> None:
    _, stub = served
    base = call_span([1], [2, 3])
    child = call_span([4], [5], base=base.span_id, base_length=2)
    child.model_call.prompt.base_choice = 3
    answer = await append(stub, group("1", base, child))
    assert answer.rejected[0].status.reason == error_reason_pb2.ERROR_REASON_DELTA_BASE_UNKNOWN
    assert model_call_pb2.PromptTokens.FromString(b"") == model_call_pb2.PromptTokens()

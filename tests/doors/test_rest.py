"""REST: the routes of Agent Lightning's store, its statuses, and what bad requests are told."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import grpc
import httpx
import pytest

from agl_grpc.client import StoreClient
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.http.rest import inputs
from agl_grpc.v1 import store_service_pb2
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def span_of(attempt: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A span's JSON."""
    return {
        "rollout_id": attempt["rollout_id"],
        "attempt_id": attempt["attempt_id"],
        "sequence_id": 1,
        "trace_id": TRACE,
        "span_id": SPAN,
        "parent_id": None,
        "name": "step",
        "status": {"status_code": "OK", "description": None},
        "attributes": {"n": 1},
        "events": [{"name": "e", "attributes": {"x": [1, 2]}, "timestamp": 1700000000.1234567}],
        "links": [],
        "start_time": 1700000000.5,
        "end_time": 1700000001.25,
        "context": None,
        "parent": None,
        "resource": {"attributes": {"service.name": "s"}, "schema_url": ""},
        **fields,
    }


async def start(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """A started rollout."""
    answer = await http.post("/agl/v1/rollouts", json={"input": "task", **body})
    assert answer.status_code == 201, answer.text
    started: dict[str, Any] = answer.json()
    return started


async def test_long_numbers_keep_their_value(http: httpx.AsyncClient) -> None:
    rollout = await start(http)
    path = f"/agl/v1/rollouts/{rollout['rollout_id']}"
    changed = await http.post(path, json={"input": [2**70, 1.5], "metadata": {"n": 2**62}})
    assert changed.json()["input"] == [2**70, 1.5]
    assert (await http.get(path)).json()["metadata"] == {"n": 2**62}
    refused = await http.post(path, json={"metadata": {"n": 2**70}})
    assert (refused.status_code, refused.json()["field"]) == (422, "metadata")


async def test_both_prefixes_show_one_store(server: StoreServer) -> None:
    async with httpx.AsyncClient(base_url=server.url) as http:
        assert (await http.get("/agl/v1/health")).json() == {"status": "ok"}
        made = await http.post(
            "/v1/agl/queues/rollouts/enqueue",
            json={"rollouts": [{"input": {"q": 1}, "mode": "train", "metadata": {"a": None}}]},
        )
        assert made.status_code == 201
        (rollout,) = made.json()
        assert rollout["input"] == {"q": 1}
        assert rollout["config"] == {
            "timeout_seconds": None,
            "unresponsive_seconds": None,
            "max_attempts": 1,
            "retry_condition": [],
        }
        listed = (await http.get("/agl/v1/rollouts", params={"status_in": ["queuing", "failed"]})).json()
        assert listed == {"items": [rollout], "limit": -1, "offset": 0, "total": 1}
        (taken,) = (await http.post("/agl/v1/queues/rollouts/dequeue")).json()
        assert taken["attempt"]["status"] == "preparing"
        path = f"/v1/agl/rollouts/{taken['rollout_id']}/attempts"
        updated = await http.post(f"{path}/latest", json={"status": "succeeded"})
        assert updated.json()["end_time"] is not None
        waited = await http.post("/agl/v1/waits/rollouts", json={"rollout_ids": [taken["rollout_id"]]})
        assert [one["status"] for one in waited.json()] == ["succeeded"]
        assert (await http.get("/agl/v1/statistics")).json()["total_rollouts"] == 1


async def test_a_span_comes_back_as_it_was(http: httpx.AsyncClient) -> None:
    attempt = (await start(http))["attempt"]
    sent = span_of(attempt, kind="SpanKind.CLIENT", parent_id="00f067aa0ba902b7", end_time=None)
    sent["links"] = [
        {
            "context": {"trace_id": TRACE, "span_id": SPAN, "is_remote": True, "trace_state": {"k": "v"}},
            "attributes": None,
        }
    ]
    sent["resource"]["schema_url"] = "http://schema"
    answer = await http.post("/agl/v1/spans", json=sent)
    assert answer.status_code == 201, answer.text
    again = await http.post("/agl/v1/spans", json=sent)
    assert (again.status_code, again.json()) == (201, None)
    (shown,) = (await http.get("/agl/v1/spans", params={"rollout_id": attempt["rollout_id"]})).json()["items"]
    assert shown == answer.json()
    given = {name: value for name, value in sent.items() if name not in ("context", "parent")}
    assert {name: shown[name] for name in given} == given
    assert shown["context"]["span_id"] == SPAN
    assert shown["parent"]["span_id"] == "00f067aa0ba902b7"


async def test_token_ids_become_a_model_call(memory: StoreServer, http: httpx.AsyncClient) -> None:
    attempt = (await start(http))["attempt"]
    logprobs = json.dumps([{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}])
    attributes = {
        "prompt_token_ids": [1, 2, 3],
        "response_token_ids": [4, 5],
        "logprobs.content": logprobs,
        "gen_ai.request.model": "m",
        "gen_ai.response.id": "r1",
    }
    await http.post("/agl/v1/spans", json=span_of(attempt, attributes=attributes))
    async with grpc.aio.insecure_channel(memory.address) as channel:
        request = store_service_pb2.ListSpansRequest(rollout_id=attempt["rollout_id"])
        (stored,) = (await StoreServiceStub(channel).ListSpans(request)).spans
    call = stored.span.model_call
    assert list(call.prompt.token_ids) == [1, 2, 3]
    assert list(call.choices[0].token_ids) == [4, 5]
    assert list(call.choices[0].logprobs) == [-0.5, -1.5]
    assert (call.model, call.request_id) == ("m", "r1")


async def test_what_the_original_answers_with_null_stays_null(http: httpx.AsyncClient) -> None:
    for path in ("workers/w", "resources/latest", "resources/rs-none", "rollouts/none/attempts/latest"):
        answer = await http.get(f"/agl/v1/{path}")
        assert (answer.status_code, answer.json()) == (200, None), path
    empty = (await http.get("/agl/v1/rollouts/none/attempts")).json()
    assert empty == {"items": [], "limit": -1, "offset": 0, "total": 0}
    missing = await http.get("/agl/v1/rollouts/none")
    assert missing.status_code == 404
    assert missing.json()["reason"] == "ENTITY_NOT_FOUND"


async def test_lists_are_cut_and_sorted(http: httpx.AsyncClient) -> None:
    ids = [(await start(http, mode=mode))["rollout_id"] for mode in ("train", "val", "test")]
    for method, path in (("GET", "rollouts"), ("POST", "rollouts/search")):
        asked = {"limit": 2, "offset": 1, "sort_by": "start_time", "sort_order": "desc"}
        given: Any = {"params": asked} if method == "GET" else {"json": asked}
        page = (await http.request(method, f"/agl/v1/{path}", **given)).json()
        assert [one["rollout_id"] for one in page["items"]] == [ids[1], ids[0]]
        assert (page["limit"], page["offset"], page["total"]) == (2, 1, 3)


async def test_a_cancelled_attempt_is_shown_as_failed(http: httpx.AsyncClient) -> None:
    rollout = await start(http)
    path = f"/agl/v1/rollouts/{rollout['rollout_id']}"
    assert (await http.post(path, json={"status": "cancelled"})).json()["status"] == "cancelled"
    latest = (await http.get(f"{path}/attempts/latest")).json()
    assert latest["status"] == "failed"
    assert latest["metadata"] == {"agl_grpc.cancelled": "cancelled by its owner"}
    late = await http.post(path, json={"status": "running"})
    assert (late.status_code, late.json()["reason"]) == (409, "ILLEGAL_TRANSITION")


async def test_large_inputs_go_in_and_out_as_they_are(memory: StoreServer, http: httpx.AsyncClient) -> None:
    large = {"text": "x" * (3 << 20), "n": 1}
    rollout = await start(http, input=large)
    assert rollout["input"] == large
    queued = await http.post("/agl/v1/queues/rollouts/enqueue", json={"rollouts": [{"input": large}] * 2})
    assert [one["input"] for one in queued.json()] == [large, large], queued.text[:200]
    taken = (await http.post("/agl/v1/queues/rollouts/dequeue", json={})).json()
    assert [one["input"] for one in taken] == [large]
    legacy = (await http.get("/task")).json()["task"]
    assert legacy["input"] == large
    path = f"/agl/v1/rollouts/{rollout['rollout_id']}"
    assert (await http.get(path)).json()["input"] == large
    larger = [*range(400_000)]
    assert (await http.post(path, json={"input": larger})).json()["input"] == larger
    page = (await http.get("/agl/v1/rollouts", params={"sort_by": "start_time"})).json()
    assert [one["input"] for one in page["items"]] == [larger, large, large]
    assert (await http.post(f"{path}/attempts", json={})).json()["input"] == larger
    # The same content is kept once, and a gRPC client gets it too.
    async with StoreClient(memory.address) as client:
        found = await client.get_rollout_by_id(taken[0]["rollout_id"])
    assert found is not None
    assert found.input == large


async def test_lists_of_inputs_have_no_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each may be as large as a body; together they may be larger.
    monkeypatch.setattr(inputs, "SHOWN_BYTES", 3 << 20)
    large = [f"{place}" * (2 << 20) for place in range(3)]
    body = {"rollouts": [{"input": one} for one in ("small", *large)]}
    ids = [
        one["rollout_id"] for one in (await http.post("/agl/v1/queues/rollouts/enqueue", json=body)).json()
    ]
    asked = {"sort_by": "start_time", "limit": 3}
    page = (await http.get("/agl/v1/rollouts", params=asked)).json()
    assert [one["input"] for one in page["items"]] == ["small", *large[:2]]
    assert (page["limit"], page["offset"], page["total"]) == (3, 0, 4)
    assert (await http.head("/agl/v1/rollouts")).content == b""
    taken = (await http.post("/agl/v1/queues/rollouts/dequeue", json={"limit": 4})).json()
    assert [one["input"] for one in taken] == ["small", *large]
    for one in ids:
        await http.post(f"/agl/v1/rollouts/{one}/attempts/latest", json={"status": "succeeded"})
    waited = (await http.post("/agl/v1/waits/rollouts", json={"rollout_ids": ids[::-1]})).json()
    assert [one["input"] for one in waited] == [*large[::-1], "small"]
    monkeypatch.setattr(inputs, "SHOWN_BYTES", 1 << 20)
    assert "blob_digest" in (await http.get(f"/agl/v1/rollouts/{ids[1]}")).json()["input"]


async def test_a_list_that_nobody_reads_to_its_end(memory: StoreServer, http: httpx.AsyncClient) -> None:
    # More than fits between server and client: the rest is made when this has been read.
    ids = [(await start(http, input=f"{place:04}" * (1 << 20)))["rollout_id"] for place in range(8)]
    asked = {"sort_by": "start_time"}
    for leave in (True, False):
        async with http.stream("GET", "/agl/v1/rollouts", params=asked) as answer:
            pieces = answer.aiter_bytes()
            text = await anext(pieces)
            if leave:
                continue
            async with StoreClient(memory.address) as client:
                await client.cancel_rollouts(ids)
                await client.delete_rollouts(ids)
            text += b"".join([piece async for piece in pieces])
    # It is of one moment: what was deleted meanwhile is shown.
    shown = [one["input"] for one in json.loads(text)["items"]]
    assert shown == [f"{place:04}" * (1 << 20) for place in range(8)]
    assert (await http.get("/agl/v1/rollouts")).json()["items"] == []


async def test_spans_are_sorted_by_their_attempt(http: httpx.AsyncClient) -> None:
    rollout = await start(http)
    rollout_id = rollout["rollout_id"]
    second = (await http.post(f"/agl/v1/rollouts/{rollout_id}/attempts", json={})).json()
    for place, attempt in enumerate((rollout["attempt"], second["attempt"], rollout["attempt"])):
        sent = span_of(attempt, span_id=f"{place + 1:016x}", sequence_id=place + 1)
        assert (await http.post("/agl/v1/spans", json=sent)).status_code == 201
    for order in ("asc", "desc"):
        asked = {"rollout_id": rollout_id, "sort_by": "attempt_id", "sort_order": order}
        shown = (await http.get("/agl/v1/spans", params=asked)).json()["items"]
        ids = [one["attempt_id"] for one in shown]
        assert ids == sorted(ids, reverse=order == "desc")
        assert len(set(ids)) == 2
    asked = {"rollout_id": rollout_id, "sort_by": "rollout_id"}
    assert (await http.get("/agl/v1/spans", params=asked)).json()["total"] == 3


async def test_an_idempotency_key_is_honoured(http: httpx.AsyncClient) -> None:
    first, second = [
        await http.post("/agl/v1/rollouts", json={"input": 1}, headers={"Idempotency-Key": "k"})
        for _ in range(2)
    ]
    assert first.json()["rollout_id"] == second.json()["rollout_id"]


BAD: list[tuple[str, str, dict[str, Any], int, str, str]] = [
    ("POST", "rollouts", {"content": "{}"}, 415, "MEDIA_TYPE_UNSUPPORTED", ""),
    ("POST", "rollouts", {"json": []}, 422, "INVALID_FIELD", ""),
    ("POST", "rollouts", {"json": {}}, 422, "INVALID_FIELD", "input"),
    ("POST", "rollouts", {"json": {"input": 1, "mode": "x"}}, 422, "INVALID_FIELD", "mode"),
    ("POST", "rollouts", {"json": {"input": 1, "resources_id": "no"}}, 409, "RESOURCE_MISSING", ""),
    (
        *("POST", "rollouts", {"json": {"input": 1, "config": {"max_attempts": 0}}}),
        *(422, "INVALID_FIELD", "config.max_attempts"),
    ),
    (
        *("POST", "queues/rollouts/enqueue", {"json": {"rollouts": [{"input": 1}, {"mode": "val"}]}}),
        *(422, "INVALID_FIELD", "rollouts[1].input"),
    ),
    ("POST", "queues/rollouts/enqueue", {"json": {"rollouts": 3}}, 422, "INVALID_FIELD", "rollouts"),
    ("GET", "rollouts", {"params": {"limit": 0}}, 400, "INVALID_FIELD", "limit"),
    ("GET", "rollouts", {"params": {"limit": "many"}}, 422, "INVALID_FIELD", "limit"),
    ("GET", "rollouts", {"params": {"offset": -1}}, 400, "INVALID_FIELD", "offset"),
    ("GET", "rollouts", {"params": {"sort_by": "shoe"}}, 400, "INVALID_FIELD", "sort_by"),
    ("GET", "rollouts", {"params": {"sort_order": "up"}}, 422, "INVALID_FIELD", "sort_order"),
    ("GET", "rollouts", {"params": {"filter_logic": "xor"}}, 422, "INVALID_FIELD", "filter_logic"),
    ("GET", "rollouts", {"params": {"status_in": "lost"}}, 422, "INVALID_FIELD", "status_in[0]"),
    ("GET", "spans", {}, 422, "INVALID_FIELD", "rollout_id"),
    ("POST", "spans/next", {"json": {"rollout_id": "a", "attempt_id": "b"}}, 404, "ENTITY_NOT_FOUND", ""),
    ("POST", "rollouts/none", {"json": {"status": None}}, 400, "INVALID_FIELD", "status"),
    ("POST", "rollouts/none/attempts/latest", {"json": {"metadata": None}}, 400, "INVALID_FIELD", "metadata"),
    ("POST", "rollouts/none/attempts/latest", {"json": {"status": "failed"}}, 404, "ENTITY_NOT_FOUND", ""),
    ("POST", "rollouts/none/attempts", {}, 404, "ENTITY_NOT_FOUND", ""),
    ("POST", "resources", {"json": {"r": {"endpoint": "e"}}}, 422, "INVALID_FIELD", "r.resource_type"),
    ("POST", "resources", {"json": {"r": {"resource_type": "llm"}}}, 422, "INVALID_FIELD", "r.endpoint"),
    ("POST", "workers/w", {"json": {"heartbeat_stats": None}}, 400, "INVALID_FIELD", "heartbeat_stats"),
    ("DELETE", "rollouts", {}, 405, "METHOD_NOT_ALLOWED", ""),
    ("GET", "nothing", {}, 404, "ROUTE_UNKNOWN", ""),
    ("GET", "../v2/rollouts", {}, 404, "ROUTE_UNKNOWN", ""),
]


async def test_a_bad_request_is_told_what_is_wrong(http: httpx.AsyncClient) -> None:
    for method, path, given, status, reason, field in BAD:
        answer = await http.request(method, f"/agl/v1/{path}", **given)
        assert answer.status_code == status, (path, given, answer.text)
        assert answer.headers["content-type"] == "application/json"
        assert "Traceback" not in answer.text
        body = answer.json()
        assert (body["reason"], body["field"]) == (reason, field or None), body
        assert body["detail"]
        assert "\n" not in body["detail"]
    assert (await http.get("/agl/v1/statistics")).json()["total_rollouts"] == 0


SPAN_FAULTS: list[tuple[dict[str, Any], int, str]] = [
    ({"span_id": ""}, 422, "span_id"),
    ({"span_id": "0" * 16}, 400, "span_id"),
    ({"trace_id": "xyz"}, 422, "trace_id"),
    ({"parent_id": "12"}, 422, "parent_id"),
    ({"name": ""}, 400, "name"),
    ({"name": 3}, 422, "name"),
    ({"end_time": 1.0}, 400, "end_time"),
    ({"start_time": -5}, 422, "start_time"),
    ({"sequence_id": -1}, 422, "sequence_id"),
    ({"events": [{}]}, 422, "events[0].name"),
    ({"links": [{"context": {"trace_id": TRACE}}]}, 422, "links[0].context.span_id"),
    ({"status": {"status_code": "FINE"}}, 422, "status.status_code"),
    ({"attributes": [1]}, 422, "attributes"),
]


async def test_bad_spans_are_refused_and_leave_nothing(http: httpx.AsyncClient) -> None:
    attempt = (await start(http))["attempt"]
    for fault, status, field in SPAN_FAULTS:
        answer = await http.post("/agl/v1/spans", json=span_of(attempt, **fault))
        assert (answer.status_code, answer.json()["field"]) == (status, field), (fault, answer.text)
    foreign = await http.post("/agl/v1/spans", json=span_of({**attempt, "attempt_id": "at-other"}))
    assert (foreign.status_code, foreign.json()["reason"]) == (404, "ENTITY_NOT_FOUND")
    wrong = await http.post("/agl/v1/spans", json=span_of({**attempt, "rollout_id": "ro-other"}))
    assert wrong.status_code in (400, 404)
    assert (await http.get("/agl/v1/statistics")).json()["total_spans"] == 0


async def test_bodies_that_cannot_be_read(http: httpx.AsyncClient) -> None:
    whole = gzip.compress(json.dumps({"input": "x" * 1000}).encode())
    kind = {"Content-Type": "application/json"}
    packed = {**kind, "Content-Encoding": "gzip"}
    cases: list[tuple[bytes, dict[str, str], int, str]] = [
        (whole, packed, 201, ""),
        (whole[:-20], packed, 400, "BODY_MALFORMED"),
        (b"no gzip", packed, 400, "BODY_MALFORMED"),
        (b"{", kind, 422, "BODY_MALFORMED"),
        (b'{"input": "\\ud800"}', kind, 422, "BODY_MALFORMED"),
        (b'{"input": NaN}', kind, 422, "INVALID_FIELD"),
        (b"x", {**kind, "Content-Encoding": "br"}, 415, "ENCODING_UNSUPPORTED"),
        (gzip.compress(b" " * (65 << 20), 1), packed, 413, "BODY_TOO_LARGE"),
    ]
    for body, headers, status, reason in cases:
        answer = await http.post("/agl/v1/rollouts", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert status == 201 or answer.json()["reason"] == reason


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"this is no HTTP\r\n\r\n", "this is no HTTP request that can be read"),
        (
            b"GET /agl/v1/spans?trace_id=" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
            "the URL has 70023 bytes; at most 65535 are allowed",
        ),
    ],
    ids=["no-http", "long-url"],
)
async def test_what_is_no_http_request_is_refused_like_every_other(
    http: httpx.AsyncClient, sent: bytes, said: str
) -> None:
    url = http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(sent)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n")
    problem = json.loads(body)
    assert (problem["reason"], problem["detail"]) == ("INVALID_REQUEST", said)
    assert (await http.get("/agl/v1/rollouts")).status_code == 200


async def test_waits_end_with_their_client_and_with_the_server(memory: StoreServer) -> None:
    async with httpx.AsyncClient(base_url=memory.url, timeout=10) as http:
        rollout = await start(http)
        asked = {"rollout_ids": [rollout["rollout_id"]], "timeout": None}
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/agl/v1/waits/rollouts", json=asked, timeout=0.2)
        waiting = asyncio.create_task(http.post("/agl/v1/waits/rollouts", json=asked))
        assert (await http.get("/agl/v1/health")).json() == {"status": "ok"}
        await memory.stop()
        assert (await waiting).json() == []


async def test_a_token_guards_every_route() -> None:
    server = await StoreServer.start(
        ServeConfig(port=0, http_port=0, database=None, grace=1.0, operator_token="secret")
    )
    try:
        async with httpx.AsyncClient(base_url=server.url) as http:
            assert (await http.get("/agl/v1/health")).status_code == 200
            refused = await http.get("/agl/v1/rollouts")
            assert (refused.status_code, refused.json()["reason"]) == (401, "UNAUTHENTICATED")
            allowed = await http.get("/agl/v1/rollouts", headers={"Authorization": "Bearer secret"})
            assert allowed.status_code == 200
    finally:
        await server.stop()


async def test_pages_of_other_sites_are_kept_out() -> None:
    config = ServeConfig(port=0, http_port=0, database=None, grace=1.0, cors_origins=("http://mine",))
    server = await StoreServer.start(config)
    try:
        async with httpx.AsyncClient(base_url=server.url) as http:
            for headers, status in (
                ({"Sec-Fetch-Site": "cross-site", "Origin": "http://other"}, 403),
                ({"Sec-Fetch-Site": "cross-site"}, 403),
                ({"Sec-Fetch-Site": "cross-site", "Origin": "http://mine"}, 200),
                ({"Sec-Fetch-Site": "same-origin"}, 200),
                ({}, 200),
            ):
                assert (await http.get("/task", headers=headers)).status_code == status, headers
            asked = await http.options("/agl/v1/rollouts", headers={"Origin": "http://mine"})
            assert asked.status_code == 204
            assert asked.headers["access-control-allow-origin"] == "http://mine"
            other = await http.options("/agl/v1/rollouts", headers={"Origin": "http://other"})
            assert "access-control-allow-origin" not in other.headers
    finally:
        await server.stop()

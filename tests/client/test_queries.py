"""Every condition, order and bound of every `query_*`: each face of the client, each back end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agl_grpc.client import InvalidRequest, StoreClient
from agl_grpc.model import AttemptedRollout, EnqueueRolloutRequest, PromptTemplate, Span
from tests.client.faces import Faces

ORDER = {"sort_by", "sort_order", "limit", "offset"}
KEYWORDS: dict[str, set[str]] = {
    "query_rollouts": {
        *("status_in", "rollout_id_in", "rollout_id_contains", "filter_logic", "status", "rollout_ids"),
        *ORDER,
    },
    "query_attempts": {"rollout_id", *ORDER},
    "query_resources": {"resources_id", "resources_id_contains", *ORDER},
    "query_spans": {
        *("rollout_id", "attempt_id", "trace_id", "trace_id_contains", "span_id", "span_id_contains"),
        *("parent_id", "parent_id_contains", "name", "name_contains", "filter_logic"),
        *ORDER,
    },
    "query_workers": {"status_in", "worker_id_contains", "filter_logic", *ORDER},
}
"""What Agent Lightning 0.3 takes."""


@pytest.fixture
def client(any_face: Faces) -> StoreClient:
    return any_face.client()


def test_every_keyword_of_agent_lightning_is_taken() -> None:
    for method, wanted in KEYWORDS.items():
        assert wanted <= set(inspect.signature(getattr(StoreClient, method)).parameters), method


Query = Callable[..., Any]


async def _check(query: Query, name: str, cases: Sequence[tuple[dict[str, Any], set[str]]]) -> None:
    """Each choice finds exactly what it should, whole and by two at a time."""
    for choice, expected in cases:
        found = await query(**choice)
        assert {getattr(item, name) for item in found} == expected, choice
        first = await query(**choice, limit=2)
        rest = await query(**choice, offset=2)
        assert [*first, *rest] == list(found), choice
        assert first.total == rest.total == len(expected), choice


async def _check_orders(query: Query, orders: Sequence[str]) -> None:
    """Each order is one, and its reverse; what is not set comes last."""
    for order in orders:
        up = [getattr(item, order) for item in await query(sort_by=order)]
        down = [getattr(item, order) for item in await query(sort_by=order, sort_order="desc")]
        assert up == down[::-1], order
        known = [value for value in up if value is not None]
        assert up[: len(known)] == known, f"{order}: what is not set comes last"
        if order not in ("status", "mode"):  # these follow the contract's numbers
            assert known == sorted(known), order
        assert [value for i, value in enumerate(up) if value not in up[:i]] == list(dict.fromkeys(up)), order
    with pytest.raises(InvalidRequest, match="order_by"):
        await query(sort_by="colour")


async def test_rollouts(client: StoreClient) -> None:
    prompts = await client.add_resources({"p": PromptTemplate(template="{x}")})
    names = ("alpha-1", "alpha-2", "beta-1")
    modes = ("train", "val", None)
    await client.enqueue_many_rollouts(
        [
            EnqueueRolloutRequest(input=name, rollout_id=name, mode=mode, priority=-place)
            for place, (name, mode) in enumerate(zip(names, modes, strict=True))
        ]
    )
    await client.start_rollout(1, rollout_id="gamma", resources_id=prompts.resources_id)
    await client.update_rollout("beta-1", status="succeeded")
    alphas = {"alpha-1", "alpha-2"}
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {*names, "gamma"}),
        ({"status_in": ["queuing"]}, alphas),
        ({"status": ["queuing", "succeeded"]}, {*names}),
        ({"rollout_id_in": ["alpha-1", "gamma", "nobody"]}, {"alpha-1", "gamma"}),
        ({"rollout_ids": ["gamma"]}, {"gamma"}),
        ({"rollout_id_contains": "-1"}, {"alpha-1", "beta-1"}),
        ({"rollout_id_contains": "ALPHA"}, set()),
        ({"rollout_id_contains": "-1", "status_in": ["queuing"]}, {"alpha-1"}),
        ({"rollout_id_contains": "-1", "status_in": ["queuing"], "filter_logic": "or"}, {*names}),
        ({"rollout_id_in": ["gamma"], "status_in": ["succeeded"], "filter_logic": "or"}, {"beta-1", "gamma"}),
        ({"status_in": []}, set()),
        ({"rollout_id_in": [], "status_in": ["queuing"]}, set()),
        ({"rollout_id_in": [], "status_in": ["queuing"], "filter_logic": "or"}, alphas),
        ({"rollout_id_in": [], "rollout_id_contains": "alpha", "filter_logic": "or"}, alphas),
    ]
    await _check(client.query_rollouts, "rollout_id", cases)
    orders = ("rollout_id", "status", "mode", "resources_id", "start_time", "end_time", "priority")
    await _check_orders(client.query_rollouts, orders)


async def test_attempts(client: StoreClient) -> None:
    rollout = await client.start_rollout(1, worker_id="b")
    for worker in ("c", None, "a"):
        await client.start_attempt(rollout.rollout_id, worker_id=worker)
    await client.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="failed")
    ids = {attempt.attempt_id for attempt in await client.query_attempts(rollout.rollout_id)}

    async def query(**choice: Any) -> Any:
        return await client.query_attempts(rollout.rollout_id, **choice)

    await _check(query, "attempt_id", [({}, ids)])
    orders = ("sequence_id", "attempt_id", "rollout_id", "start_time", "end_time", "status", "worker_id")
    await _check_orders(query, (*orders, "last_heartbeat_time"))
    assert (await client.query_attempts("nobody")).total == 0


def _span(rollout: AttemptedRollout, name: str, span_id: str, trace_id: str, parent: str | None) -> Span:
    return Span.from_attributes(
        attributes={},
        rollout_id=rollout.rollout_id,
        attempt_id=rollout.attempt.attempt_id,
        name=name,
        span_id=span_id,
        trace_id=trace_id,
        parent_id=parent,
    )


async def test_spans(client: StoreClient) -> None:
    first = await client.start_rollout(1)
    second = await client.start_attempt(first.rollout_id)
    one, two, three, four = (f"{n}" * 16 for n in "abcd")
    left, right = "12" * 16, "13" * 16
    spans = [
        _span(first, "plan", one, left, None),
        _span(first, "call", two, left, one),
        _span(first, "call-tool", three, right, two),
        _span(second, "Plan", four, right, None),
    ]
    await client.add_many_spans(spans)

    async def query(**choice: Any) -> Any:
        return await client.query_spans(first.rollout_id, **choice)

    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {one, two, three, four}),
        ({"attempt_id": first.attempt.attempt_id}, {one, two, three}),
        ({"attempt_id": "latest"}, {four}),
        ({"trace_id": left}, {one, two}),
        ({"trace_id_contains": "313"}, {three, four}),
        ({"span_id": two}, {two}),
        ({"span_id_contains": "cc"}, {three}),
        ({"parent_id": one}, {two}),
        ({"parent_id_contains": "bbb"}, {three}),
        ({"name": "call"}, {two}),
        ({"name_contains": "call"}, {two, three}),
        ({"name_contains": "plan"}, {one}),
        ({"name_contains": "call", "trace_id": left}, {two}),
        ({"name_contains": "call", "trace_id": left, "filter_logic": "or"}, {one, two, three}),
        ({"attempt_id": "latest", "name": "call", "trace_id": right, "filter_logic": "or"}, {four}),
    ]
    await _check(query, "span_id", cases)
    orders = ("sequence_id", "name", "trace_id", "span_id", "parent_id", "attempt_id", "rollout_id")
    await _check_orders(query, (*orders, "start_time", "end_time"))
    assert (await client.query_spans("nobody")).total == 0
    for name, digits in (("trace_id", 32), ("span_id", 16), ("parent_id", 16)):
        with pytest.raises(ValueError, match=f"{name} is 'xyz'; it must be {digits} hex digits"):
            await client.query_spans("nobody", **{name: "xyz"})


async def test_resources(client: StoreClient) -> None:
    for name in ("prompts-b", "prompts-a", "weights", "prompts-b"):
        await client.update_resources(name, {"p": PromptTemplate(template="{x}")})
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {"prompts-a", "prompts-b", "weights"}),
        ({"resources_id": "prompts-b"}, {"prompts-b"}),
        ({"resources_id_contains": "prompts"}, {"prompts-a", "prompts-b"}),
        ({"resources_id_contains": "PROMPTS"}, set()),
    ]
    await _check(client.query_resources, "resources_id", cases)
    await _check_orders(client.query_resources, ("resources_id", "version", "create_time", "update_time"))
    versions = await client.query_resources(resources_id="prompts-b", all_versions=True)
    assert [update.version for update in versions] == [1, 2]


async def test_workers(client: StoreClient) -> None:
    for name in ("gpu-2", "gpu-1", "cpu-1"):
        await client.update_worker(name, status="idle")
    started = await client.start_rollout(1, worker_id="gpu-1")
    gpus = {"gpu-1", "gpu-2"}
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {*gpus, "cpu-1"}),
        ({"status_in": ["busy"]}, {"gpu-1"}),
        ({"status_in": ["busy", "idle"]}, {*gpus, "cpu-1"}),
        ({"worker_id_contains": "gpu"}, gpus),
        ({"worker_id_contains": "GPU"}, set()),
        ({"worker_id_contains": "gpu", "status_in": ["idle"]}, {"gpu-2"}),
        ({"worker_id_contains": "cpu", "status_in": ["busy"], "filter_logic": "or"}, {"gpu-1", "cpu-1"}),
        ({"status_in": []}, set()),
        ({"status_in": [], "worker_id_contains": "gpu"}, set()),
        ({"status_in": [], "worker_id_contains": "gpu", "filter_logic": "or"}, gpus),
    ]
    await _check(client.query_workers, "worker_id", cases)
    times = ("last_heartbeat_time", "last_dequeue_time", "last_busy_time", "last_idle_time")
    orders = ("worker_id", "status", "current_rollout_id", "current_attempt_id", *times)
    await _check_orders(client.query_workers, orders)
    busy = await client.get_worker_by_id("gpu-1")
    assert busy is not None
    assert busy.current_rollout_id == started.rollout_id

"""The public types keep everything on their way through the contract."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import pytest

from agl_grpc.model import (
    LLM,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    Choice,
    EnqueueRolloutRequest,
    Event,
    Failure,
    FailureKind,
    Lease,
    Link,
    LogprobSemantics,
    ModelCall,
    ModelCallOutcome,
    PolicyRun,
    PromptTemplate,
    ProxyLLM,
    Resource,
    ResourceBinding,
    ResourcesUpdate,
    Reward,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    SpanKind,
    StatusCode,
    TraceStatus,
    UnknownResource,
    WeightSource,
    register_resource,
)
from agl_grpc.model.enums import _CONTRACT
from agl_grpc.model.rollout import attempted_rollout

FAILURE = Failure(kind=FailureKind.GRADER, message="no grade", type="ValueError", detail="trace")
CONFIG = RolloutConfig(
    timeout_seconds=1.5,
    unresponsive_seconds=2.5,
    max_attempts=3,
    retry_condition=["failed", AttemptStatus.TIMEOUT],
    max_redeliveries=0,
    retry_backoff_seconds=0.25,
)
ATTEMPT = Attempt(
    rollout_id="ro-1",
    attempt_id="at-1",
    sequence_id=2,
    start_time=1.25,
    end_time=2.5,
    status=AttemptStatus.TIMEOUT,
    worker_id="w",
    last_heartbeat_time=2.0,
    metadata={"a": [1, None]},
    failure=FAILURE,
    resources_id="rs-1",
    resources_version=4,
    leased=True,
    sealed=True,
    seal_time=3.0,
    capture_incomplete=True,
    open_calls=2,
    lease_lost=True,
    spans_evicted=True,
)
ROLLOUT = Rollout(
    rollout_id="ro-1",
    input={"question": "1+1"},
    start_time=1.25,
    end_time=2.5,
    mode=RolloutMode.TRAIN,
    resources_id="rs-1",
    status=RolloutStatus.FAILED,
    config=CONFIG,
    metadata={"b": True},
    run_id="run",
    resources_version=4,
    group_id="g",
    queue="q",
    priority=-3,
    labels={"gpu": "yes"},
    not_before=1.0,
    expire_after_seconds=60.0,
    failure=FAILURE,
    retry_of="ro-0",
    attempt_count=2,
    latest_attempt_id="at-1",
    sealed=True,
    binding=ResourceBinding.AT_LEASE,
)
CALL = ModelCall(
    model="m",
    prompt_token_ids=np.array([1, 2, 3], np.int32),
    choices=[
        Choice(
            index=1,
            token_ids=np.array([4, 5], np.int32),
            logprobs=np.array([-0.5, -1.25], np.float32),
            finish_reason="stop",
            stop_reason="<end>",
            policy_runs=[PolicyRun(0, 1, 7), PolicyRun(1, 2, 8)],
            routed_experts=b"\x01",
            kept_set_sizes=[3, 4],
        )
    ],
    sampling={"temperature": 0.0, "max_tokens": 5, "n": 2, "guided": "json"},
    logprob_semantics=LogprobSemantics.RAW,
    outcome=ModelCallOutcome.CUT,
    untrainable_reason="cut",
    engine_id="e",
    engine_version="vllm 0.32.0",
    weights_digest="sha256:1",
    cache_salt="s",
    api="chat.completions",
    request_id="r",
    queue_ns=1,
    first_token_ns=2,
    total_ns=3,
    raw_request={"messages": []},
    raw_response=b"\x00",
    agent_name="planner",
    mode="train",
    retry_of="00f0000000000001",
)
SPAN = Span(
    rollout_id="ro-1",
    attempt_id="at-1",
    name="work",
    trace_id="0a" * 16,
    span_id="0b" * 8,
    parent_id="0c" * 8,
    sequence_id=5,
    start_time_ns=1_700_000_000_123_456_789,
    end_time_ns=1_700_000_001_123_456_789,
    attributes={"k": ["v", "w"], "b": b"\x00"},
    status=TraceStatus(status_code=StatusCode.ERROR, description="bad"),
    kind=SpanKind.CLIENT,
    events=[Event(name="e", time_ns=5, attributes={"x": 1})],
    links=[Link(trace_id="0d" * 16, span_id="0e" * 8, attributes={"y": 2}, trace_state="s=1")],
    resource={"service.name": "agent"},
    scope_name="scope",
    scope_version="1",
    trace_state="a=b",
    model_call=CALL,
)


def test_no_field_of_the_samples_above_is_left_at_its_default() -> None:
    """So that the round trips below cover every field."""
    for sample in (ROLLOUT, ATTEMPT, CALL, CALL.choices[0], SPAN, CONFIG):
        for field in fields(sample):
            if field.name in {"received_time", "late"}:
                continue
            empty = getattr(sample, field.name)
            assert not _is_default(empty, field), f"{type(sample).__name__}.{field.name}"


def _is_default(value: Any, field: Any) -> bool:
    return not isinstance(value, np.ndarray) and value == field.default


@pytest.mark.parametrize("sample", [ROLLOUT, ATTEMPT, CONFIG, FAILURE, CALL], ids=lambda s: type(s).__name__)
def test_samples_come_back(sample: Any) -> None:
    message = sample.to_proto()
    back = type(sample).from_proto(type(message).FromString(message.SerializeToString()))
    assert back == sample


def test_spans_come_back_to_the_nanosecond() -> None:
    message = SPAN.to_proto()
    back = Span.from_span_proto(
        type(message).FromString(message.SerializeToString()), rollout_id="ro-1", attempt_id="at-1"
    )
    assert back == SPAN
    assert back.start_time == pytest.approx(1_700_000_000.123456789)


def test_zero_is_a_value_of_sampling_and_rewards() -> None:
    assert ModelCall.from_proto(CALL.to_proto()).sampling["temperature"] == 0.0
    reward = Reward(
        rollout_id="r", attempt_id="a", value=0, step=0, target_span_id="0b" * 8, grader="judge", metadata={}
    )
    assert Reward.from_proto(reward.to_proto()) == reward
    assert RolloutConfig.from_proto(CONFIG.to_proto()).max_redeliveries == 0


def test_a_rollout_with_an_attempt_of_another_is_refused() -> None:
    with pytest.raises(ValueError, match="is of ro-1, not of ro-2"):
        AttemptedRollout(rollout_id="ro-2", attempt=ATTEMPT)


def test_attempted_rollouts_come_back() -> None:
    joined = attempted_rollout(ROLLOUT.to_proto(), ATTEMPT.to_proto(), "secret")
    assert (joined.attempt, joined.attempt_credential, joined.input) == (ATTEMPT, "secret", ROLLOUT.input)
    assert "secret" not in repr(joined)


def test_a_request_says_all_that_a_spec_knows() -> None:
    request = EnqueueRolloutRequest(
        input=1,
        mode="val",
        resources_id="rs",
        config=CONFIG,
        metadata={"a": 1},
        rollout_id="mine",
        group_id="g",
        queue="q",
        priority=2,
        labels={"a": "b"},
        not_before=5.0,
        expire_after_seconds=1.0,
        binding="at_lease",
        resources_version=3,
    )
    message = request.to_proto()
    assert {field.name for field in message.DESCRIPTOR.fields} == {f.name for f, _ in message.ListFields()}


def test_enums_are_the_contracts() -> None:
    for kind, wrapper in _CONTRACT.items():
        assert len(kind) == len(wrapper.keys()) - 1, kind.__name__
        for member in kind:
            assert kind.from_proto(member.number) is member
        assert kind.from_proto(0) is None
        assert kind.from_proto(4711) is None
    assert RolloutStatus.SUCCEEDED == "succeeded"
    with pytest.raises(ValueError, match="'done' is not a RolloutStatus; allowed: queuing, preparing"):
        RolloutStatus.parse("done")


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://h:1", "http://h:1/rollout/ro/attempt/at"),
        ("http://h:1/", "http://h:1/rollout/ro/attempt/at"),
        ("http://h:1/v1", "http://h:1/rollout/ro/attempt/at/v1"),
        ("http://h:1/v1/", "http://h:1/rollout/ro/attempt/at/v1"),
        ("http://h:1/base/v1", "http://h:1/base/rollout/ro/attempt/at/v1"),
    ],
)
def test_a_proxy_url_names_its_attempt(endpoint: str, url: str) -> None:
    llm = ProxyLLM(endpoint=endpoint, model="m")
    assert llm.get_base_url("ro", "at") == url
    assert llm.get_base_url() == endpoint
    with pytest.raises(ValueError, match="needs both"):
        llm.get_base_url("ro")


def test_an_attempts_llm_carries_its_credential_unless_it_has_a_key() -> None:
    joined = attempted_rollout(ROLLOUT.to_proto(), ATTEMPT.to_proto(), "secret")
    llm = ProxyLLM(endpoint="http://h:1/v1", model="m", sampling_parameters={"temperature": 0.7})
    plain = llm.with_attempted_rollout(joined)
    assert type(plain) is LLM
    assert plain.endpoint == "http://h:1/rollout/ro-1/attempt/at-1/v1"
    assert (plain.api_key, plain.sampling_parameters) == ("secret", {"temperature": 0.7})
    llm.api_key = "own"
    assert llm.with_attempted_rollout(joined).api_key == "own"


def test_templates_are_filled_in() -> None:
    assert PromptTemplate(template="{a} and {b[0]}").format(a=1, b=[2]) == "1 and 2"
    jinja = PromptTemplate(template="{% for x in xs %}{{ x }}{% endfor %}", engine="jinja")
    assert jinja.format(xs=[1, 2]) == "12"
    with pytest.raises(KeyError, match="without a value: b"):
        PromptTemplate(template="{a} {b}").format(a=1)
    with pytest.raises(ValueError, match="engine 'mustache' is unknown; allowed: f-string, jinja, poml"):
        PromptTemplate(template="", engine="mustache")


@register_resource
@dataclass(slots=True, kw_only=True)
class SearchIndex(Resource):
    """A resource of a test's own."""

    resource_type: ClassVar[str] = "test_search_index"
    url: str
    shards: list[int]


def test_resources_come_back_in_order() -> None:
    update = ResourcesUpdate(
        resources_id="rs-1",
        version=2,
        resources={
            "main": ProxyLLM(endpoint="http://h/v1", model="m", api_key="k", sampling_parameters={"n": 2}),
            "plain": LLM(endpoint="http://h/v1", model="m"),
            "prompt": PromptTemplate(template="{x}", engine="jinja"),
            "index": SearchIndex(url="u", shards=[1, 2]),
        },
        create_time=1.0,
        update_time=2.0,
        run_id="run",
    )
    back = ResourcesUpdate.from_proto(update.to_proto())
    assert back == update
    assert list(back.resources) == list(update.resources)
    assert type(back.resources["plain"]) is LLM


def test_resource_types_that_are_not_registered() -> None:
    unknown = UnknownResource(type_name="elsewhere", fields={"a": 1})
    update = ResourcesUpdate(resources_id="r", resources={"x": unknown})
    assert ResourcesUpdate.from_proto(update.to_proto()).resources["x"] == unknown

    @dataclass(slots=True, kw_only=True)
    class Stranger(Resource):
        resource_type: ClassVar[str] = "stranger"

    with pytest.raises(TypeError, match="resource 'x' is a Stranger; register its type"):
        ResourcesUpdate(resources_id="r", resources={"x": Stranger()}).to_proto()
    with pytest.raises(ValueError, match="'llm' is taken"):
        register_resource(type("Mine", (LLM,), {}))


def test_failures_are_made_of_exceptions_and_cut_to_size() -> None:
    try:
        raise KeyError("x" * 10_000)
    except KeyError as error:
        failure = Failure.from_exception(error)
    assert (failure.kind, failure.type) == (FailureKind.AGENT, "KeyError")
    assert "test_failures_are_made" in failure.detail
    message = Failure(message="é" * 5000, detail="x" * 70_000 + "end").to_proto()
    assert len(message.message.encode()) <= 4096
    assert message.detail.endswith("end")
    assert len(message.detail) == 65_536
    assert Failure(message="half \ud83d", detail="\ud83d").to_proto().message == "half \\ud83d"


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        RolloutConfig(max_attempts=0)
    with pytest.raises(ValueError, match="must be finite"):
        Reward(rollout_id="r", attempt_id="a", value=float("nan"))
    with pytest.raises(ValueError, match="span_id is 'xyz'; it must be 16 hex digits"):
        Span(rollout_id="r", attempt_id="a", name="n", span_id="xyz").to_proto()


def test_leases_and_weight_sources_come_back() -> None:
    lease = Lease(rollout_id="r", attempt_id="a", lease_token=b"t", duration=12.5, attempt_credential="c")
    assert Lease.from_proto(lease.to_proto()) == lease
    source = WeightSource(
        rendezvous="h:1", backend="gloo", group_id="g", world_size=2, engine_ids=["e"], path="p"
    )
    assert WeightSource.from_proto(source.to_proto()) == source

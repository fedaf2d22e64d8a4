"""A call of a model with its exact tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from agl_grpc.model.enums import LogprobSemantics, ModelCallOutcome, number_of
from agl_grpc.model.value import from_key_values, from_payload, to_key_values, to_payload
from agl_grpc.v1 import model_call_pb2

TokenIds = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]


def token_ids(values: npt.ArrayLike) -> TokenIds:
    """Token ids as a one-dimensional int32 array."""
    return np.asarray(values, dtype=np.int32)


def logprobs(values: npt.ArrayLike) -> Logprobs:
    """Log probabilities as a one-dimensional float32 array."""
    return np.asarray(values, dtype=np.float32)


class PolicyRun(NamedTuple):
    """Response tokens ``start`` to ``end`` (exclusive) were sampled under one policy version."""

    start: int
    end: int
    policy_version: int


@dataclass(slots=True, kw_only=True)
class Choice:
    """One sampled answer: ids ``[n]`` int32, log probabilities ``[n]`` float32, policy versions over them."""

    index: int = 0
    token_ids: TokenIds = field(default_factory=lambda: token_ids([]))
    logprobs: Logprobs = field(default_factory=lambda: logprobs([]))
    finish_reason: str = ""
    stop_reason: str = ""
    policy_runs: list[PolicyRun] = field(default_factory=list)
    routed_experts: bytes = b""
    kept_set_sizes: list[int] = field(default_factory=list)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self.to_proto() == other.to_proto()

    @classmethod
    def from_proto(cls, message: model_call_pb2.Choice) -> Self:
        """Read the stored form."""
        return cls(
            index=message.index,
            token_ids=token_ids(message.token_ids),
            logprobs=logprobs(message.logprobs),
            finish_reason=message.finish_reason,
            stop_reason=message.stop_reason,
            policy_runs=[PolicyRun(run.start, run.end, run.policy_version) for run in message.policy_runs],
            routed_experts=message.routed_experts,
            kept_set_sizes=list(message.kept_set_sizes),
        )

    def to_proto(self) -> model_call_pb2.Choice:
        """Write the stored form."""
        return model_call_pb2.Choice(
            index=self.index,
            token_ids=_plain(self.token_ids),
            logprobs=_plain(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            policy_runs=[
                model_call_pb2.PolicyRun(start=run.start, end=run.end, policy_version=run.policy_version)
                for run in self.policy_runs
            ],
            routed_experts=self.routed_experts,
            kept_set_sizes=self.kept_set_sizes,
        )


# A list goes into a message four times faster than an array does.
def _plain(values: npt.NDArray[Any] | Sequence[Any]) -> Sequence[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else values


_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "seed",
    "n",
)


def _read_sampling(message: model_call_pb2.SamplingParameters) -> dict[str, Any]:
    named = {field.name: value for field, value in message.ListFields() if field.name in _SAMPLING}
    return named | from_key_values(message.other)


@dataclass(slots=True, kw_only=True)
class ModelCall:
    """A call of a model: whole prompt ids ``[p]`` int32, answers, sampling in force, and how it went.

    ``sampling`` holds what the engine used, by API names (``temperature``, ``top_p``, ``max_tokens``, …).
    ``untrainable_reason`` empty means that it may be trained. Durations are in nanoseconds. ``retry_of`` is
    the span id (hexadecimal) of an earlier call that this one repeats: its answer never reached the agent.
    """

    model: str = ""
    prompt_token_ids: TokenIds = field(default_factory=lambda: token_ids([]))
    choices: list[Choice] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    logprob_semantics: LogprobSemantics | None = None
    outcome: ModelCallOutcome | None = None
    untrainable_reason: str = ""
    engine_id: str = ""
    engine_version: str = ""
    weights_digest: str = ""
    cache_salt: str = ""
    api: str = ""
    request_id: str = ""
    queue_ns: int = 0
    first_token_ns: int = 0
    total_ns: int = 0
    raw_request: Any = None
    raw_response: Any = None
    agent_name: str = ""
    mode: str = ""
    retry_of: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelCall) and self.to_proto() == other.to_proto()

    @classmethod
    def from_proto(cls, message: model_call_pb2.ModelCall) -> Self:
        """Read the stored form; its prompt must be whole, as readers of the store always get it."""
        if message.prompt.base_span_id:
            raise ValueError("the prompt is a difference to an earlier call; read it through the store")
        sampling = _read_sampling(message.sampling)
        return cls(
            model=message.model,
            prompt_token_ids=token_ids(message.prompt.token_ids),
            choices=[Choice.from_proto(choice) for choice in message.choices],
            sampling=sampling,
            logprob_semantics=LogprobSemantics.from_proto(message.logprob_semantics),
            outcome=ModelCallOutcome.from_proto(message.outcome),
            untrainable_reason=message.untrainable_reason,
            engine_id=message.engine_id,
            engine_version=message.engine_version,
            weights_digest=message.weights_digest,
            cache_salt=message.cache_salt,
            api=message.api,
            request_id=message.request_id,
            queue_ns=message.timings.queue_ns,
            first_token_ns=message.timings.first_token_ns,
            total_ns=message.timings.total_ns,
            raw_request=from_payload(message.raw_request),
            raw_response=from_payload(message.raw_response),
            agent_name=message.agent_name,
            mode=message.mode,
            retry_of=message.retry_of.hex(),
        )

    def to_proto(self) -> model_call_pb2.ModelCall:
        """Write the stored form, with a whole prompt."""
        named = {name: self.sampling[name] for name in _SAMPLING if self.sampling.get(name) is not None}
        other = {name: value for name, value in self.sampling.items() if name not in named}
        return model_call_pb2.ModelCall(
            model=self.model,
            prompt=model_call_pb2.PromptTokens(token_ids=_plain(self.prompt_token_ids)),
            choices=[choice.to_proto() for choice in self.choices],
            sampling=model_call_pb2.SamplingParameters(**named, other=to_key_values(other, "sampling")),
            logprob_semantics=number_of(self.logprob_semantics),
            outcome=number_of(self.outcome),
            untrainable_reason=self.untrainable_reason,
            engine_id=self.engine_id,
            engine_version=self.engine_version,
            weights_digest=self.weights_digest,
            cache_salt=self.cache_salt,
            api=self.api,
            request_id=self.request_id,
            timings=model_call_pb2.ModelCallTimings(
                queue_ns=self.queue_ns, first_token_ns=self.first_token_ns, total_ns=self.total_ns
            ),
            raw_request=None if self.raw_request is None else to_payload(self.raw_request, "raw_request"),
            raw_response=None if self.raw_response is None else to_payload(self.raw_response, "raw_response"),
            agent_name=self.agent_name,
            mode=self.mode,
            retry_of=bytes.fromhex(self.retry_of),
        )

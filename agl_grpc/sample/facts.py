"""What the calls and rewards of an attempt say besides their tokens: for metrics, never for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from agl_grpc.model.value import from_key_values, from_payload
from agl_grpc.sample.types import AttemptRecord, SampleRules
from agl_grpc.v1.reward_pb2 import Reward

AGENT = "agent"
"""Who gave a reward that names no grader."""
FORMAT = "format"
"""The reward (or a grader's component ``…/format``) that judges form: 0 or less = malformed."""
_ERROR_BEGINNINGS = ("error", "traceback (most recent call last)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The newest reward of one grader and name for the whole attempt, with the grader's notes."""

    grader: str
    name: str
    value: float
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def malformed(self) -> bool | None:
        """Whether the answer had the wrong form; None = this verdict does not judge form."""
        if "malformed" in self.notes:
            return bool(self.notes["malformed"])
        return self.value <= 0.0 if self.name.rpartition("/")[2] == FORMAT else None


@dataclass(frozen=True, slots=True)
class AttemptFacts:
    """Counts over an attempt's calls of the trained model, and its verdicts.

    answers: sampled answers; truncated: those that the length limit cut off. tool_results: results of tools
    that the model was shown; tool_errors: those that say an error. verdicts: one for each grader and name.
    """

    answers: int = 0
    truncated: int = 0
    tool_results: int = 0
    tool_errors: int = 0
    verdicts: tuple[Verdict, ...] = ()

    @property
    def malformed(self) -> bool | None:
        """Whether any verdict on form says so; None = none judges form."""
        said = [verdict.malformed for verdict in self.verdicts if verdict.malformed is not None]
        return any(said) if said else None


def observe(record: AttemptRecord, rules: SampleRules) -> AttemptFacts:
    """The facts of an attempt. A request that is no JSON has no tool results."""
    answers = truncated = 0
    results: dict[str, bool] = {}
    for stored in record.spans:
        call = stored.call if hasattr(stored, "call") else stored.span.model_call
        if stored.late or (rules.model and call.model != rules.model):
            continue
        answers += len(call.choices)
        truncated += sum(choice.finish_reason == "length" for choice in call.choices)
        # A conversation repeats its results in each call: they count once.
        results.update(_tool_results(from_payload(call.raw_request)))
    return AttemptFacts(
        answers, truncated, len(results), sum(results.values()), tuple(_verdicts(record.rewards))
    )


def _verdicts(rewards: Iterable[Reward]) -> Iterator[Verdict]:
    newest: dict[tuple[str, str], Reward] = {}
    for reward in rewards:
        if reward.HasField("value") and not reward.target_span_id and not reward.HasField("step"):
            key = (reward.grader or AGENT, reward.name or "primary")
            if key not in newest or reward.revision >= newest[key].revision:
                newest[key] = reward
    for (grader, name), reward in newest.items():
        yield Verdict(grader, name, reward.value, from_key_values(reward.metadata))


def _tool_results(request: Any) -> Iterator[tuple[str, bool]]:
    """Id of each tool result of a request, and whether it is an error.

    Known are OpenAI's messages of role ``tool``, Anthropic's ``tool_result`` blocks and the Responses API's
    ``function_call_output``.
    """
    if not isinstance(request, Mapping):
        return
    said = request.get("messages", request.get("input"))
    for place, message in enumerate(said if isinstance(said, list) else ()):
        if not isinstance(message, Mapping):
            continue
        if message.get("role") == "tool":
            yield str(message.get("tool_call_id") or place), _says_error(message.get("content"))
        elif message.get("type") == "function_call_output":
            yield str(message.get("call_id") or place), _says_error(message.get("output"))
        elif isinstance(message.get("content"), list):
            for part in message["content"]:
                if isinstance(part, Mapping) and part.get("type") == "tool_result":
                    wrong = bool(part.get("is_error")) or _says_error(part.get("content"))
                    yield str(part.get("tool_use_id") or place), wrong


def _says_error(content: Any) -> bool:
    """Text that begins with Error or a traceback, or a JSON object with an ``error`` that is something."""
    if isinstance(content, list):
        return any(_says_error(part.get("text")) for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        return False
    text = content.lstrip()
    if text.startswith("{"):
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return False
        return isinstance(value, dict) and bool(value.get("error"))
    return text.lower().startswith(_ERROR_BEGINNINGS)

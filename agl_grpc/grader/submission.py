"""What a grader is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from agl_grpc.grader.conversation import Decode, Message, conversation, text_of
from agl_grpc.model import Attempt, Rollout, Span, semconv
from agl_grpc.v1 import span_pb2

_EMITTED = (semconv.MESSAGE_BODY, semconv.OBJECT_LITERAL, semconv.OBJECT_JSON)


class Submission:
    """A sealed attempt as a grader sees it: the task, what was answered, and the spans behind it.

    Everything is read when it is first asked for: a grader that looks at the answer alone costs no reading
    of spans. Made by hand (in tests, or to grade what no store holds) it takes the same names.

    Args:
        input: The task.
        response: The final answer's text; None = read from the messages.
        messages: The last conversation in OpenAI's form, its answer last; None = read from the spans.
        rollout_id: The rollout.
        attempt_id: The attempt.
        mode: `train`, `val` or `test`; None = none was said.
        metadata: The rollout's notes.
        resources: What the attempt ran with, by name; empty = not read.
        status: How the attempt ended, for example `succeeded`.
        group_id: The rollout's group; None = it has none.
        spans: The attempt's spans in order.
        decode: Token ids to text, for calls of which only tokens were recorded.
    """

    def __init__(
        self,
        *,
        input: Any = None,
        response: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        rollout_id: str = "",
        attempt_id: str = "",
        mode: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        resources: Mapping[str, Any] | None = None,
        status: str = "succeeded",
        group_id: str | None = None,
        spans: Sequence[Span] = (),
        decode: Decode | None = None,
    ) -> None:
        self.input = input
        self.rollout_id = rollout_id
        self.attempt_id = attempt_id
        self.mode = mode
        self.metadata = dict(metadata or {})
        self.resources = dict(resources or {})
        self.status = status
        self.group_id = group_id
        self._decode = decode
        self._raw_spans: Sequence[bytes] = ()
        if response is not None:
            self.response = response
        if messages is not None:
            self.messages = [dict(message) for message in messages]
        if spans:
            self.spans = list(spans)

    @classmethod
    def from_stored(
        cls,
        rollout: Rollout,
        attempt: Attempt,
        spans: Sequence[bytes],
        *,
        resources: Mapping[str, Any] | None = None,
        decode: Decode | None = None,
    ) -> Submission:
        """The submission of an attempt in the store; `spans` are serialised `StoredSpan`s in order."""
        made = cls(
            input=rollout.input,
            rollout_id=rollout.rollout_id,
            attempt_id=attempt.attempt_id,
            mode=None if rollout.mode is None else str(rollout.mode),
            metadata=rollout.metadata,
            resources=resources,
            status=str(attempt.status),
            group_id=rollout.group_id,
            decode=decode,
        )
        made._raw_spans = list(spans)
        return made

    @cached_property
    def spans(self) -> list[Span]:
        """The attempt's spans in order, model calls with whole prompts."""
        return [Span.from_proto(span_pb2.StoredSpan.FromString(raw)) for raw in self._raw_spans]

    @cached_property
    def messages(self) -> list[Message]:
        """The last conversation in OpenAI's form, its answer last; empty when none was recorded as text."""
        return conversation(self.spans, self._decode)

    @cached_property
    def response(self) -> str:
        """The final answer's text: the last model call's answer, else what the agent emitted last.

        Empty when there is neither: a grader decides whether that is a wrong answer.
        """
        if self.messages:
            return text_of(self.messages[-1].get("content"))
        emitted = self.emitted
        return "" if not emitted else str(emitted[-1])

    @cached_property
    def emitted(self) -> list[Any]:
        """What the agent emitted with `emit_message` and `emit_object`, in order."""
        found = []
        for span in self.spans:
            value = next((span.attributes[key] for key in _EMITTED if key in span.attributes), None)
            if value is not None:
                found.append(value)
        return found

    def to_dict(self) -> dict[str, Any]:
        """What commands and HTTP graders are told, as JSON can say it."""
        return {
            "rollout_id": self.rollout_id,
            "attempt_id": self.attempt_id,
            "group_id": self.group_id,
            "mode": self.mode,
            "status": self.status,
            "input": self.input,
            "response": self.response,
            "messages": self.messages,
            "emitted": self.emitted,
            "metadata": self.metadata,
            "resources": self.resources,
        }

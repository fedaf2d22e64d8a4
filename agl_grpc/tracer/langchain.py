"""LangChain's callbacks as spans; imported only where a handler is asked for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from opentelemetry.trace import Span, set_span_in_context

from agl_grpc.agent.attributes import flatten
from agl_grpc.agent.context import current_recorder
from agl_grpc.tracer.trace import OpenOtelSpan, Trace

if TYPE_CHECKING:
    from agl_grpc.tracer.base import Tracer

_ROLES = {"human": "user", "ai": "assistant"}


def langchain_handler(tracer: Tracer, tags: Sequence[str] = ()) -> Any:
    """A callback handler; see `Tracer.get_langchain_handler`."""
    return _handler_class()(_Runs(tracer, list(tags)))


class _Runs:
    """The runs of LangChain that are under way, by their ids, each with its open span."""

    def __init__(self, tracer: Tracer, tags: list[str]) -> None:
        self._tracer = tracer
        self._tags = tags
        self._lock = threading.Lock()
        self._open: dict[UUID, Span] = {}

    def begin(
        self, kind: str, name: str, run_id: UUID, parent: UUID | None, attributes: Mapping[str, Any]
    ) -> None:
        trace = current_recorder()
        if not isinstance(trace, Trace) or trace.tracer is not self._tracer:
            return  # Outside any trace of this tracer there is nothing to record into.
        with self._lock:
            above = self._open.get(parent) if parent else None
        # Without a span of LangChain above: under whatever the agent has open.
        context = set_span_in_context(above) if above is not None else trace.context()
        labels = {"lc_name": name, **({"tags": self._tags} if self._tags else {})}
        span = trace.tracer.otel.start_span(
            f"langchain.{kind}.{name}", context, attributes=flatten({**labels, **attributes})
        )
        with self._lock:
            self._open[run_id] = span

    def end(self, run_id: UUID, attributes: Mapping[str, Any], error: BaseException | None = None) -> None:
        with self._lock:
            span = self._open.pop(run_id, None)
        if span is None:
            return
        ended = OpenOtelSpan(span)
        ended.set_attributes(flatten(attributes))
        if error is not None:
            ended.record_exception(error)
        span.end()


@functools.cache
def _handler_class() -> type[Any]:
    try:
        from langchain_core.callbacks import BaseCallbackHandler
    except ImportError:
        raise RuntimeError(
            "LangChain's callbacks need the package langchain-core: pip install langchain-core"
        ) from None

    class Handler(BaseCallbackHandler):
        """Makes spans of chains, model calls, tools and retrievers."""

        # On the thread and in the context of the run itself, where its trace is.
        run_inline = True

        def __init__(self, runs: _Runs) -> None:
            self._runs = runs

        def on_chain_start(self, serialized: Any, inputs: Any, **given: Any) -> None:
            self._begin("Chain", serialized, given, {"langchain.chain.inputs": inputs})

        def on_chain_end(self, outputs: Any, **given: Any) -> None:
            self._runs.end(given["run_id"], {"langchain.chain.outputs": outputs})

        def on_llm_start(self, serialized: Any, prompts: list[str], **given: Any) -> None:
            messages = [{"role": "user", "content": prompt} for prompt in prompts]
            self._begin("LLM", serialized, given, _request(messages, given))

        def on_chat_model_start(self, serialized: Any, messages: list[list[Any]], **given: Any) -> None:
            every = [_message(message) for turn in messages for message in turn]
            self._begin("ChatModel", serialized, given, _request(every, given))

        def on_llm_end(self, response: Any, **given: Any) -> None:
            self._runs.end(given["run_id"], _response(response))

        def on_tool_start(self, serialized: Any, input_str: str, **given: Any) -> None:
            attributes = {"tool.name": _name(serialized, given), "tool.parameters": input_str}
            self._begin("Tool", serialized, given, attributes)

        def on_tool_end(self, output: Any, **given: Any) -> None:
            self._runs.end(given["run_id"], {"tool.result": getattr(output, "content", output)})

        def on_retriever_start(self, serialized: Any, query: str, **given: Any) -> None:
            self._begin("Retriever", serialized, given, {"langchain.retriever.query": query})

        def on_retriever_end(self, documents: Any, **given: Any) -> None:
            self._runs.end(given["run_id"], {"langchain.retriever.documents": list(documents)})

        def _failed(self, error: BaseException, **given: Any) -> None:
            self._runs.end(given["run_id"], {}, error)

        on_chain_error = on_llm_error = on_tool_error = on_retriever_error = _failed

        def _begin(
            self, kind: str, serialized: Any, given: Mapping[str, Any], attributes: Mapping[str, Any]
        ) -> None:
            name = _name(serialized, given)
            self._runs.begin(kind, name, given["run_id"], given.get("parent_run_id"), attributes)

    return Handler


def _name(serialized: Any, given: Mapping[str, Any]) -> str:
    known = serialized or {}
    path = known.get("id") or ["run"]
    return str(given.get("name") or known.get("name") or path[-1])


def _message(message: Any) -> dict[str, Any]:
    calls = [
        {"id": call.get("id"), "name": call.get("name"), "arguments": call.get("args")}
        for call in getattr(message, "tool_calls", None) or []
    ]
    role = _ROLES.get(message.type, message.type)
    return {"role": role, "content": message.content, **({"tool_calls": calls} if calls else {})}


def _request(messages: list[dict[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = given.get("invocation_params") or {}
    model = parameters.get("model") or parameters.get("model_name")
    return {"gen_ai.prompt": messages, "gen_ai.request.model": model}


def _response(response: Any) -> dict[str, Any]:
    choices = [choice for choices in response.generations for choice in choices]
    completions = [
        _message(message)
        if (message := getattr(choice, "message", None)) is not None
        else {"role": "assistant", "content": choice.text}
        for choice in choices
    ]
    first = getattr(choices[0], "message", None) if choices else None
    usage = getattr(first, "usage_metadata", None) or {}
    metadata = getattr(first, "response_metadata", None) or {}
    return {
        "gen_ai.completion": completions,
        "gen_ai.response.id": metadata.get("id"),
        "gen_ai.response.model": metadata.get("model_name"),
        "gen_ai.usage.input_tokens": usage.get("input_tokens"),
        "gen_ai.usage.output_tokens": usage.get("output_tokens"),
    }

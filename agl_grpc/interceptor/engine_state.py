"""What is read from inside vLLM's API server process: the states of requests under way.

Everything that the interceptor touches beyond documented interfaces stands here and in `generate`, and is
pinned by a contract test for the supported vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from agl_grpc.interceptor.record import ChoiceRecord
from agl_grpc.interceptor.versions import runs_from_engine


def sampled_logprobs(logprobs: Any, token_ids: Sequence[int]) -> list[float]:
    """The sampled tokens' own logprobs from vLLM's per-position tables."""
    if not logprobs:
        return []
    return [table[token].logprob for table, token in zip(logprobs, token_ids, strict=True)]


def request_states(output_processor: Any, external_id: str) -> list[Any]:
    """States of the sequences of one request that have not finished, by the id that the API gave it."""
    internal = output_processor.external_req_ids.get(external_id, ())
    states = (output_processor.request_states.get(request_id) for request_id in internal)
    return [state for state in states if state is not None]


def external_ids(output_processor: Any, request_ids: Iterable[str], internal: bool) -> Iterator[str]:
    """The API's ids of requests that are named by internal (or already by external) ids."""
    for request_id in request_ids:
        if not internal:
            yield request_id
            continue
        state = output_processor.request_states.get(request_id)
        parent = output_processor.parent_requests.get(request_id)
        if state is not None:
            yield state.external_req_id
        elif parent is not None:
            yield parent.external_req_id


def progress(state: Any) -> tuple[int, int]:
    """Index of a sequence's choice, and how many tokens it has sampled."""
    return state.request_index, state.detokenizer.num_output_tokens()


def snapshot(state: Any) -> ChoiceRecord:
    """A sequence as far as it has come: every token that left the engine core, passed on or not."""
    tokens = list(state.detokenizer.output_token_ids)
    choice = ChoiceRecord(state.request_index, tokens)
    choice.logprobs = sampled_logprobs(state.logprobs_processor.logprobs, tokens)
    choice.runs = runs_from_engine(state.weight_version_starts, len(tokens)) or []
    return choice


def finished_siblings(state: Any) -> list[Any]:
    """Outputs of the same request (n > 1, not streamed) that have finished and wait for the others."""
    if state.parent_req is None:
        return []
    return [output for output in state.parent_req.output_aggregator if output is not None]

"""What is read from inside vLLM's API server process: the states of requests under way.

Everything that the interceptor touches beyond documented interfaces stands here and in `generate`, and is
pinned by a contract test for the supported vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agl_grpc.interceptor.capture.record import ChoiceRecord
from agl_grpc.interceptor.capture.versions import runs_from_engine
from agl_grpc.interceptor.inside.core_logprobs import taken_from


def watch_requests(output_processor: Any, on_sequence: Callable[[str, Any, Any], None]) -> None:
    """Call `on_sequence(API's request id, state, request)` as each sequence begins, before any token."""
    original = output_processor.add_request

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        original(request, *args, **kwargs)
        state = output_processor.request_states.get(request.request_id)
        if state is not None:
            on_sequence(state.external_req_id, state, request)

    output_processor.add_request = add_request


def watch_outputs(output_processor: Any, on_abort: Callable[[str], bool]) -> None:
    """Take sampled logprobs out of what the engine core says, and ask `on_abort(internal request id)` about
    each abort that it announces.

    Where that answers True, vLLM does not hear of the abort.
    """
    original = output_processor.process_outputs
    logprobs = _Logprobs(output_processor.request_states)

    def process_outputs(
        outputs: Any, engine_core_timestamp: float | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        logprobs.take(outputs, engine_core_timestamp)
        if any(map(_is_abort, outputs)):
            outputs = [each for each in outputs if not (_is_abort(each) and on_abort(each.request_id))]
        return original(outputs, engine_core_timestamp, *args, **kwargs)

    output_processor.process_outputs = process_outputs


def _is_abort(output: Any) -> bool:
    return output.finish_reason is not None and str(output.finish_reason) == "abort"


class _Logprobs:
    """Gives the sampled logprobs that come from the engine core to the sequences that collect them.

    They come with the first output of a message, which vLLM may process in several pieces: its time tells
    which pieces are one message's.
    """

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._states = states
        self._numbers: array[float] = array("f")
        self._next = 0
        self._time: float | None = None

    def take(self, outputs: Sequence[Any], timestamp: float | None) -> None:
        """A piece of a message has come."""
        numbers = taken_from(outputs[0]) if outputs else None
        if numbers is not None:
            self._numbers, self._next, self._time = numbers, 0, timestamp
        elif self._next >= len(self._numbers) or self._time != timestamp:
            return
        numbers, at, states = self._numbers, self._next, self._states
        for output in outputs:
            count = len(output.new_token_ids)
            state = states.get(output.request_id)
            # A sequence whose capture failed, or that is gone, has nowhere to put them.
            sampled = None if state is None else getattr(state.logprobs_processor, "sampled", None)
            if sampled is not None:
                sampled += numbers[at : at + count]
            at += count
        self._next = at


@functools.cache
def _sampled_logprobs_class() -> Any:
    from vllm.v1.engine.logprobs import LogprobsProcessor

    class SampledLogprobs(LogprobsProcessor):  # type: ignore[misc]  # vllm is not type-checked here
        def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
            # One row per token; the sampled token comes first in its row.
            self.sampled.extend(row[0] for row in logprobs_lists[1].tolist())

    return SampledLogprobs


def keep_sampled_logprobs(state: Any) -> None:
    """Let a sequence collect its sampled tokens' logprobs as plain numbers, unseen by the API.

    vLLM's own tables (a dictionary and a decoded text per token) are then not built: the answer is made as
    if no logprobs had been asked for.
    """
    old = state.logprobs_processor
    values = {each.name: getattr(old, each.name) for each in dataclasses.fields(old)}
    kept = _sampled_logprobs_class()(**{**values, "logprobs": None, "cumulative_logprob": None})
    kept.sampled = array("f")
    state.logprobs_processor = kept


def tokens_so_far(state: Any) -> int:
    """How many tokens a sequence has sampled."""
    return int(state.detokenizer.num_output_tokens())


def snapshot(state: Any) -> ChoiceRecord:
    """A sequence as far as it has come: every token that left the engine core, passed on or not."""
    tokens = array("I", state.detokenizer.output_token_ids)
    processor = state.logprobs_processor
    sampled = getattr(processor, "sampled", None)
    choice = ChoiceRecord(state.request_index, tokens)
    # A stop string may have taken back tokens of the last step.
    choice.logprobs = (
        _from_tables(processor.logprobs, tokens) if sampled is None else sampled[: len(tokens)].tolist()
    )
    choice.runs = runs_from_engine(getattr(state, "weight_version_starts", ()), len(tokens)) or []
    return choice


def _from_tables(tables: Any, tokens: Sequence[int]) -> list[float]:
    """The sampled tokens' logprobs from vLLM's tables, kept because the API asked for them."""
    return [table[token].logprob for table, token in zip(tables or (), tokens, strict=False)]

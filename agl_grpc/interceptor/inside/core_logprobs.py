"""Sampled logprobs in vLLM's engine core, and on their way to the API server: no more than is asked for.

vLLM sends three arrays with each token, which costs the two processes some 20 µs a token for packing and
unpacking them. Of a captured call whose client has not asked for logprobs only the sampled token's is
needed: a number that travels beside the token, in a field of vLLM's that serialises by itself. The request
says so (`wanted`); an engine core in which this is not installed sends the arrays, which are read as well.

Nobody reads the rank of a sampled token either, for which vLLM compares it with the whole vocabulary and pays
some 0.1 ms a step for calling a compiled function: a step in which only such calls want logprobs leaves it
out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

_KEY = "agl_grpc_logprobs"
"""In a request's extra sampling arguments: send numbers. In an output's transfer parameters: the numbers."""

_MARK = "_agl_grpc_logprobs"


def wanted(extra_args: dict[str, Any] | None) -> dict[str, Any]:
    """A request's extra sampling arguments, by which it wants its logprobs as numbers."""
    return {**(extra_args or {}), _KEY: True}


def without_ours(extra_args: Iterable[str] | None) -> list[str]:
    """The names of extra sampling arguments that are the client's."""
    return [name for name in extra_args or () if name != _KEY]


def taken_from(output: Any) -> list[float] | None:
    """The numbers that came with an engine core's output, which is then as vLLM made it; None: none came."""
    params = output.kv_transfer_params
    if params is None or (found := params.pop(_KEY, None)) is None:
        return None
    output.kv_transfer_params = params or None
    numbers: list[float] = found
    return numbers


class _Place(NamedTuple):
    """Which rows of a step's logprobs are a request's: its number in the step, and how many tokens it has."""

    number: int
    positions: int


class _Rows:
    """In the place of a step's logprobs: notes which rows are a request's instead of cutting them out.

    A vLLM that cuts in another way gets what it asks for.
    """

    def __init__(self, logprobs: Any) -> None:
        self._logprobs = logprobs

    def slice_request(self, number: int, positions: int) -> _Place:
        return _Place(number, positions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logprobs, name)


def install() -> None:
    """Change the scheduler and the sampler of this process, an engine core's or a worker's; a second call
    changes nothing.

    What differs from the supported vLLM is left alone.
    """
    _install_scheduler()
    _install_sampler()


def _install_scheduler() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.update_from_output
    if hasattr(original, _MARK) or not _takes(original, "self", "scheduler_output", "model_runner_output"):
        return

    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        logprobs = model_runner_output.logprobs
        marked = set() if logprobs is None else _marked(self.requests, scheduler_output.num_scheduled_tokens)
        if not marked:
            return original(self, scheduler_output, model_runner_output)
        model_runner_output.logprobs = _Rows(logprobs)
        try:
            by_client = original(self, scheduler_output, model_runner_output)
        finally:
            model_runner_output.logprobs = logprobs
        # The sampled token comes first in its row.
        column = logprobs.logprobs[:, 0].tolist()
        for outputs in by_client.values():
            for output in outputs.outputs:
                _settle(output, logprobs, column, marked)
        return by_client

    setattr(update_from_output, _MARK, True)
    Scheduler.update_from_output = update_from_output


def _install_sampler() -> None:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather, sample = Sampler.gather_logprobs, GPUModelRunner._sample
    if hasattr(gather, _MARK) or not (
        _takes(gather, "logprobs", "num_logprobs", "token_ids")
        and _takes(sample, "self", "logits", "spec_decode_metadata")
    ):
        return
    # Whether the step that samples now has captured calls only that want logprobs.
    numbers_only = False

    @functools.wraps(gather)
    def gather_logprobs(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
        if not numbers_only or num_logprobs:
            return gather(logprobs, num_logprobs, token_ids)
        column = token_ids.unsqueeze(-1)
        # In the place of the ranks stands what has their shape.
        return LogprobsTensors(column, logprobs.gather(-1, column), token_ids)

    @functools.wraps(sample)
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        nonlocal numbers_only
        wanting = self.input_batch.num_logprobs
        numbers_only = bool(wanting) and len(_marked(self.requests, wanting)) == len(wanting)
        try:
            return sample(self, logits, spec_decode_metadata)
        finally:
            numbers_only = False

    setattr(gather_logprobs, _MARK, True)
    Sampler.gather_logprobs = staticmethod(gather_logprobs)
    GPUModelRunner._sample = _sample


def _takes(function: Any, *names: str) -> bool:
    return tuple(inspect.signature(function).parameters) == names


def _marked(requests: Any, scheduled: Iterable[str]) -> set[str]:
    """Which of the scheduled requests want numbers."""
    found = set()
    for request_id in scheduled:
        request = requests.get(request_id)
        params = None if request is None else request.sampling_params
        if params is not None and params.extra_args and _KEY in params.extra_args:
            found.add(request_id)
    return found


def _settle(output: Any, logprobs: Any, column: list[float], marked: set[str]) -> None:
    """Numbers for those who want them, for others what vLLM gives."""
    place = output.new_logprobs
    if type(place) is not _Place:
        return
    if output.request_id not in marked:
        output.new_logprobs = logprobs.slice_request(*place)
        return
    starts = logprobs.cu_num_generated_tokens
    start = place.number if starts is None else starts[place.number]
    numbers = column[start : start + place.positions]
    output.new_logprobs = None
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), _KEY: numbers}

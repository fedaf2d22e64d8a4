"""Sampled logprobs in vLLM's engine core, and on their way to the API server: no more than is asked for.

vLLM sends three arrays with each token, which costs the two processes some 20 µs a token for packing and
unpacking them. Of a captured call whose client has not asked for logprobs only the sampled token's is
needed: the numbers of a step travel together, as bytes in a field of its first output that vLLM serialises by
itself. The request says so (`wanted`); an engine core in which this is not installed sends the arrays, which
are read as well.

Nobody reads the rank of a sampled token either, for which vLLM compares it with the whole vocabulary and pays
some 0.1 ms a step for calling a compiled function: a step in which only such calls want logprobs leaves it
out, and the scheduler cuts nothing out for them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_KEY = "agl_grpc_logprobs"
"""In a request's extra sampling arguments: send numbers. In an output's transfer parameters: the numbers of
it and of the outputs after it, in their order, a 32-bit float (little-endian) for each token.
"""

_MARK = "_agl_grpc_logprobs"


def wanted(extra_args: dict[str, Any] | None) -> dict[str, Any]:
    """A request's extra sampling arguments, by which it wants its logprobs as numbers."""
    return {**(extra_args or {}), _KEY: True}


def without_ours(extra_args: Iterable[str] | None) -> list[str]:
    """The names of extra sampling arguments that are the client's."""
    return [name for name in extra_args or () if name != _KEY]


def taken_from(output: Any) -> array[float] | None:
    """The numbers that came with an engine core's output, which is then as vLLM made it; None: none came."""
    params = output.kv_transfer_params
    if params is None or (found := params.pop(_KEY, None)) is None:
        return None
    output.kv_transfer_params = params or None
    numbers = array("f", found)
    if sys.byteorder == "big":
        numbers.byteswap()
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
        if logprobs is None:
            return original(self, scheduler_output, model_runner_output)
        alone = _are_numbers(logprobs)
        marked = set() if alone else _marked(self.requests, scheduler_output.num_scheduled_tokens)
        if not (alone or marked):
            return original(self, scheduler_output, model_runner_output)
        model_runner_output.logprobs = None if alone else _Rows(logprobs)
        try:
            by_client = original(self, scheduler_output, model_runner_output)
        finally:
            model_runner_output.logprobs = logprobs
        for outputs in by_client.values():
            if not alone:
                _settle(outputs.outputs, logprobs, marked)
            _attach(outputs.outputs, logprobs, model_runner_output.req_id_to_index)
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
    numbers = _numbers_class()
    # What the step that samples now gives; None: what vLLM gives. And what vLLM samples by, which is another
    # object whenever other requests are in the batch, with whether only captured calls want logprobs then.
    given: Any = None
    metadata: Any = None
    only_marked = False

    @functools.wraps(gather)
    def gather_logprobs(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
        if given is None or num_logprobs:
            return gather(logprobs, num_logprobs, token_ids)
        column = token_ids.unsqueeze(-1)
        # In the place of the ranks stands what has their shape.
        return given(column, logprobs.gather(-1, column), token_ids)

    @functools.wraps(sample)
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        nonlocal given, metadata, only_marked
        batch = self.input_batch
        if batch.sampling_metadata is not metadata:
            metadata, wanting = batch.sampling_metadata, batch.num_logprobs
            only_marked = bool(wanting) and len(_marked(self.requests, wanting)) == len(wanting)
        if only_marked:
            # What vLLM has drafted, it sorts out of whole tensors afterwards.
            given = numbers if spec_decode_metadata is None else LogprobsTensors
        try:
            return sample(self, logits, spec_decode_metadata)
        finally:
            given = None

    setattr(gather_logprobs, _MARK, True)
    Sampler.gather_logprobs = staticmethod(gather_logprobs)
    GPUModelRunner._sample = _sample


def _numbers_class() -> Any:
    """A step's logprobs of which only the sampled tokens' own are looked at, and copied."""
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    class Numbers(LogprobsTensors):  # type: ignore[misc]  # vllm is not type-checked here
        __slots__ = ()

        def to_cpu_nonblocking(self) -> Numbers:
            if self.logprobs.device.type == "cpu":
                return self
            column = self.logprobs.to("cpu", non_blocking=True)
            return Numbers(column, column, column)

        def tolists(self, cu_num_generated_tokens: Any = None) -> Any:
            column = self.logprobs.cpu().numpy()
            return LogprobsLists(column, column, column)

    return Numbers


def _are_numbers(lists: Any) -> bool:
    """Whether a step's logprobs are what `Numbers` gives: all of a step's requests that want them are ours.

    It shows also after the way from a worker's process: the array is one in three places.
    """
    return lists.logprob_token_ids is lists.logprobs


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


def _settle(outputs: Iterable[Any], logprobs: Any, marked: set[str]) -> None:
    """For those who have not asked for numbers what vLLM gives, for others nothing in its place."""
    for output in outputs:
        place = output.new_logprobs
        if type(place) is _Place:
            mine = output.request_id in marked
            output.new_logprobs = None if mine else logprobs.slice_request(*place)


def _attach(outputs: Sequence[Any], logprobs: Any, numbers: Mapping[str, int]) -> None:
    """Put the sampled tokens' logprobs of all outputs with the first one.

    `numbers` are the requests' in the step.
    """
    starts = logprobs.cu_num_generated_tokens
    # The sampled token comes first in its row.
    column = logprobs.logprobs[:, 0].tolist()
    if starts is None:
        packed = array("f", [column[numbers[each.request_id]] for each in outputs if each.new_token_ids])
    else:
        packed = array("f")
        for each in outputs:
            if each.new_token_ids:
                start = starts[numbers[each.request_id]]
                packed.extend(column[start : start + len(each.new_token_ids)])
    if packed:
        if sys.byteorder == "big":
            packed.byteswap()
        outputs[0].kv_transfer_params = {**(outputs[0].kv_transfer_params or {}), _KEY: packed.tobytes()}

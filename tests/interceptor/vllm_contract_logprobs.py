"""What the interceptor relies on of logprobs inside vLLM: checks of `vllm_contract`."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any


def check_sampled_logprobs_take_the_place_of_tables() -> None:
    import numpy as np
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    from agl_grpc.interceptor.inside.engine_state import keep_sampled_logprobs

    class State:
        logprobs_processor: object

    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=SamplingParams(logprobs=0),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    state = State()
    state.logprobs_processor = LogprobsProcessor.from_new_request(None, request)
    keep_sampled_logprobs(state)
    processor: Any = state.logprobs_processor
    lists = LogprobsLists(np.array([[7], [8]]), np.array([[-0.5], [-1.5]]), np.array([1, 2]))
    processor._update_sample_logprobs(lists)
    assert processor.sampled.tolist() == [-0.5, -1.5]
    assert processor.logprobs is None
    assert processor.cumulative_logprob is None
    assert processor.pop_prompt_logprobs() is None
    assert "_update_sample_logprobs" in inspect.getsource(LogprobsProcessor.update_from_output)


def check_sampled_logprobs_travel_as_numbers() -> None:
    import numpy as np
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from agl_grpc.interceptor.inside import core_logprobs, engine_state
    from agl_grpc.interceptor.inside.sampling import capture_params

    theirs = Scheduler.update_from_output
    source = inspect.getsource(theirs)
    assert "logprobs = model_runner_output.logprobs\n" in source
    assert "new_logprobs = logprobs.slice_request(req_index, len(new_token_ids))" in source
    assert source.count("new_logprobs") == 4, "vLLM looks at what it has cut out"
    assert "req_index = model_runner_output.req_id_to_index[req_id]" in source
    assert "and logprobs\n" in source, "vLLM does not do without logprobs that were asked for"
    pieces = inspect.getsource(AsyncLLM._run_output_handler)
    assert "processed_outputs = output_processor.process_outputs(" in pieces
    assert "outputs_slice,\n" + 28 * " " + "outputs.timestamp," in pieces, (
        "pieces of a message have other times"
    )
    core_logprobs.install()
    ours = Scheduler.update_from_output
    core_logprobs.install()
    assert Scheduler.update_from_output is ours is not theirs

    rows = LogprobsLists(
        np.array([[7, 1], [8, 2], [9, 3], [7, 4]], dtype=np.int32),
        np.array([[-0.5, -9], [-1.5, -9], [-2.5, -9], [-3.5, -9]], dtype=np.float32),
        np.array([1, 2, 3, 4], dtype=np.int32),
        [0, 2, 3, 4],
    )

    class Step:
        logprobs: Any = rows
        num_scheduled_tokens = ("plain", "captured", "last")
        req_id_to_index = {"captured": 0, "plain": 1, "last": 2}  # noqa: RUF012  # as vLLM's, a field

    def cut(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's does: one token of the first request, two of the second, one of the third."""
        logprobs = model_runner_output.logprobs
        outputs = [
            EngineCoreOutput(
                "plain", [9], new_logprobs=logprobs.slice_request(1, 1), kv_transfer_params={"theirs": 1}
            ),
            EngineCoreOutput(
                "captured",
                [7, 8],
                new_logprobs=logprobs.slice_request(0, 2),
                finish_reason=FinishReason.LENGTH,
            ),
            EngineCoreOutput("last", [7], new_logprobs=logprobs.slice_request(2, 1)),
        ]
        return {0: EngineCoreOutputs(outputs=outputs), 1: EngineCoreOutputs(finished_requests={"gone"})}

    processor = OutputProcessor(None, log_stats=False)
    engine_state.watch_outputs(processor, lambda name: True)
    queues = {}
    requests = {}
    for name, params in (
        ("captured", capture_params(SamplingParams(), {})),
        ("plain", SamplingParams(logprobs=1)),
        ("last", capture_params(SamplingParams(), {})),
    ):
        params.output_kind = RequestOutputKind.DELTA
        requests[name] = request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=[1],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        request.external_req_id = name
        queues[name] = RequestOutputCollector(RequestOutputKind.DELTA, name)
        processor.add_request(request, None, queue=queues[name])
    states = dict(processor.request_states)
    for name in ("captured", "last"):
        engine_state.keep_sampled_logprobs(states[name])

    class Core:
        pass

    core: Any = Core()
    core.requests = requests
    Scheduler.update_from_output = cut
    try:
        core_logprobs.install()
        step = Step()
        outputs = Scheduler.update_from_output(core, step, step)[0]
    finally:
        Scheduler.update_from_output = theirs
    assert step.logprobs is rows
    buffers = MsgpackEncoder().encode(outputs)
    received = MsgpackDecoder(EngineCoreOutputs).decode(buffers).outputs
    assert [each.new_logprobs is None for each in received] == [False, True, True]
    # As one message in two pieces.
    processor.process_outputs(received[:2], 1.5)
    processor.process_outputs(received[2:], 1.5)
    assert states["captured"].logprobs_processor.sampled.tolist() == [-0.5, -1.5]
    assert states["last"].logprobs_processor.sampled.tolist() == [-3.5]
    seen = queues["plain"].get_nowait()
    assert seen.kv_transfer_params == {"theirs": 1}
    (table,) = seen.outputs[0].logprobs
    assert table[9].logprob == -2.5
    # Another message, in which nothing was captured.
    processor.process_outputs([EngineCoreOutput("last", [7])], 2.5)
    assert states["last"].logprobs_processor.sampled.tolist() == [-3.5]


def check_a_step_of_captured_calls_alone_cuts_nothing_out() -> None:
    import pickle

    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    from agl_grpc.interceptor.inside import core_logprobs

    assert LogprobsLists._fields[:3] == ("logprob_token_ids", "logprobs", "sampled_token_ranks")
    assert LogprobsTensors._fields[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")
    column = torch.tensor([[-0.5], [-1.5], [-2.5]])
    tensors = core_logprobs._numbers_class()(column.long(), column, column.long())
    assert tensors.to_cpu_nonblocking() is tensors
    # From a worker's process it comes pickled.
    lists = pickle.loads(pickle.dumps(tensors.tolists()))
    asked: list[Any] = []

    class Step:
        logprobs: Any = lists
        num_scheduled_tokens = ("a", "b", "c")
        req_id_to_index = {"a": 2, "b": 1, "c": 0}  # noqa: RUF012  # as vLLM's, a field

    def cut(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's does; the prompt of `b` has not been read to its end."""
        asked.append(model_runner_output.logprobs)
        return {0: EngineCoreOutputs(outputs=[EngineCoreOutput("a", [7]), EngineCoreOutput("c", [8])])}

    theirs = Scheduler.update_from_output
    Scheduler.update_from_output = cut
    try:
        core_logprobs.install()
        step = Step()
        outputs = Scheduler.update_from_output(None, step, step)[0].outputs
    finally:
        Scheduler.update_from_output = theirs
    assert asked == [None]
    assert step.logprobs is lists
    numbers = core_logprobs.taken_from(outputs[0])
    assert numbers is not None
    assert numbers.tolist() == [-2.5, -0.5]
    assert outputs[0].kv_transfer_params is None


def check_ranks_are_counted_for_those_who_see_them_only() -> None:
    import dataclasses

    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from agl_grpc.interceptor.inside import core_logprobs
    from agl_grpc.interceptor.inside.sampling import capture_params

    refresh = inspect.getsource(InputBatch.refresh_metadata)
    assert (
        "        if batch_update:\n            self.sampling_metadata = self._make_sampling_metadata()"
        in refresh
    ), "what vLLM samples by stays the same when other requests come into the batch"
    core_logprobs.install()
    assert "only_marked" in GPUModelRunner._sample.__code__.co_freevars
    assert "given" in Sampler.gather_logprobs.__code__.co_freevars, "the sampler is another one"
    none = torch.empty(0)
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[], []],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))

    def sample(*wanting: SamplingParams) -> Any:
        """What a step gives whose two requests want logprobs in this way."""
        names = [str(number) for number in range(len(wanting))]
        batch = SimpleNamespace(
            num_logprobs=dict.fromkeys(names, 0),
            sampling_metadata=dataclasses.replace(metadata),
            update_async_output_token_ids=lambda: None,
        )
        runner: Any = SimpleNamespace(
            input_batch=batch,
            requests={
                name: SimpleNamespace(sampling_params=params)
                for name, params in zip(names, wanting, strict=True)
            },
            sampler=Sampler("processed_logprobs"),
        )
        return GPUModelRunner._sample(runner, logits.clone(), None)

    captured, asked = capture_params(SamplingParams(), {}), SamplingParams(logprobs=0)
    alone, mixed = sample(captured, captured), sample(captured, asked)
    ids = alone.sampled_token_ids
    assert ids.tolist() == mixed.sampled_token_ids.tolist() == logits.argmax(-1, keepdim=True).tolist()
    for each in (alone, mixed):
        assert torch.equal(each.logprobs_tensors.logprob_token_ids, ids)
        assert torch.equal(each.logprobs_tensors.logprobs, logits.log_softmax(-1).gather(-1, ids.long()))
        assert each.logprobs_tensors.selected_token_ranks.shape == (2,)
    assert mixed.logprobs_tensors.selected_token_ranks.tolist() == [1, 1]
    assert alone.logprobs_tensors.selected_token_ranks.tolist() != [1, 1], "ranks were counted for nobody"
    assert core_logprobs._are_numbers(alone.logprobs_tensors.tolists())
    assert not core_logprobs._are_numbers(mixed.logprobs_tensors.tolists())

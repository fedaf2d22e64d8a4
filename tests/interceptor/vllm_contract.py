"""What the interceptor relies on inside vLLM, checked one by one in the engine environment.

Each `check_*` function fails where a vLLM differs from the supported one; `test_vllm_contract` runs them.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import sys
import traceback
from collections.abc import Callable

from tests.interceptor import vllm_contract_logprobs


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]  # vLLM's functions


def check_generate() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert "lora_request" in parameters(AsyncLLM.generate)


def check_swap_methods() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert {"mode", "clear_cache"} <= set(parameters(AsyncLLM.pause_generation))
    assert parameters(AsyncLLM.collective_rpc) == ["self", "method", "timeout", "args", "kwargs"]
    assert parameters(AsyncLLM.update_weight_version) == ["self", "new_version"]
    for name in ("pause_generation", "resume_generation", "collective_rpc", "update_weight_version"):
        assert asyncio.iscoroutinefunction(getattr(AsyncLLM, name)), name


def check_seeds_on_a_cpu() -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from agl_grpc.interceptor.inside import cpu_seeds

    assert parameters(GPUModelRunner.sample_tokens) == ["self", "grammar_output"]
    assert "self.discard_request_mask" in inspect.getsource(GPUModelRunner)
    assert "self.generators: dict[int, torch.Generator]" in inspect.getsource(InputBatch)
    cpu_seeds.install()
    changed = GPUModelRunner.sample_tokens
    cpu_seeds.install()
    assert GPUModelRunner.sample_tokens is changed


def check_output_processor() -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    processor = OutputProcessor(None, log_stats=False)
    assert processor.request_states == {}
    assert parameters(processor.add_request)[:2] == ["request", "prompt"]


def check_request_state() -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestState

    request = EngineCoreRequest(
        request_id="internal",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(logprobs=0, detokenize=False, output_kind=RequestOutputKind.DELTA),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request.external_req_id = "external"
    state = RequestState.from_new_request(None, request, None, None, 3, None, False, 1)
    assert (state.external_req_id, state.request_index, state.parent_req) == ("external", 3, None)
    assert state.prompt_token_ids == [1, 2]
    assert state.weight_version_starts == []
    assert state.detokenizer.num_output_tokens() == 0
    assert list(state.detokenizer.output_token_ids) == []
    assert not state.logprobs_processor.logprobs
    assert state.output_kind.name == "DELTA"


def check_outputs() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
    from vllm.v1.metrics.stats import RequestStateStats

    output = CompletionOutput(0, "", [1], None, None)
    assert (output.finish_reason, output.stop_reason, output.weight_versions) == (None, None, None)
    span = WeightVersionSpan("7", 0, 3)
    assert (span.version, span.start, span.end) == ("7", 0, 3)
    assert {"prompt_token_ids", "outputs", "finished", "metrics"} <= set(parameters(RequestOutput))
    stats = RequestStateStats()
    assert stats.scheduled_ts == stats.queued_ts == stats.first_token_latency == 0.0


def check_sampling_parameters() -> None:
    from vllm.sampling_params import SamplingParams

    from agl_grpc.interceptor import sampling
    from agl_grpc.interceptor.inside.sampling import capture_params

    params = SamplingParams()
    assert sampling.untrainable_reasons(params) == []
    missing = [name for name in sampling._NEUTRAL if not hasattr(params, name)]
    assert missing == []
    captured = capture_params(params, {"temperature": 0.5})
    assert (captured.logprobs, captured.temperature) == (0, 0.5)
    assert (params.logprobs, params.temperature) == (None, 1.0)
    assert copy.copy(SamplingParams(seed=4)).seed == 4


def check_what_continues_an_aborted_request() -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    from agl_grpc.interceptor.inside import engine_state
    from agl_grpc.interceptor.inside.resume import AbortedByEngine, continued, obstacle

    assert str(FinishReason.ABORT) == "abort"
    for name in ("add_request_async", "abort_requests_async"):
        assert asyncio.iscoroutinefunction(getattr(AsyncMPClient, name)), name
    request = EngineCoreRequest(
        request_id="internal",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=9, min_tokens=1, seed=4, output_kind=RequestOutputKind.DELTA
        ),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request.external_req_id = "external"
    processor = OutputProcessor(None, log_stats=False)
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "internal")
    told: list[str] = []
    engine_state.watch_outputs(processor, lambda name: told.append(name) is None)
    processor.add_request(request, None, queue=queue)
    processor.process_outputs([EngineCoreOutput("internal", [7, 8])])
    processor.process_outputs([EngineCoreOutput("internal", [], finish_reason=FinishReason.ABORT)])
    state = processor.request_states["internal"]
    assert told == ["internal"]
    assert queue.get_nowait().outputs[0].token_ids == [7, 8]
    assert obstacle(request, state) == ""
    again = continued(request, state)
    assert (again.request_id, again.prompt_token_ids) == ("internal", [1, 2, 7, 8])
    params = again.sampling_params
    assert (params.max_tokens, params.min_tokens, params.seed) == (7, 0, None)
    assert (request.prompt_token_ids, request.sampling_params.max_tokens) == ([1, 2], 9)
    for name, value in {"presence_penalty": 0.5, "bad_words": ["x"], "extra_args": {"a": 1}}.items():
        other = copy.copy(request)
        other.sampling_params = SamplingParams(**{name: value})
        assert obstacle(other, state).startswith("it uses"), name
    queue.put(AbortedByEngine("why"))
    raised = ""
    try:
        queue.get_nowait()
    except AbortedByEngine as error:
        raised = str(error)
    assert raised == "why"


def check_layerwise_reload() -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    assert parameters(initialize_layerwise_reload) == ["model"]
    assert callable(finalize_layerwise_reload)


def check_worker_extension() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    from agl_grpc.weights.extension import WeightSwapExtension

    ours = [name for name in dir(WeightSwapExtension) if not name.startswith("__")]
    assert len(ours) >= 4
    for worker in (Worker, CPUWorker):
        assert [name for name in ours if hasattr(worker, name)] == []
        assert hasattr(worker, "reload_weights")


def check_plugin_protocol() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from agl_grpc.interceptor.inside.plugin import InterceptorPlugin

    assert isinstance(InterceptorPlugin(), EndpointPlugin)
    assert parameters(EndpointPlugin.init_state) == ["self", "engine_client", "state", "args"]


def check_middleware_is_outermost() -> None:
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    lines = inspect.getsource(init_entrypoints_middleware).rstrip().splitlines()
    last = max(number for number, line in enumerate(lines) if "app.add_middleware(" in line)
    assert "imported" in lines[last], "vLLM adds a middleware of its own after the user's"


def check_beam_search_request_ids() -> None:
    from vllm.entrypoints.generate.beam_search import online

    assert "-beam-{i}" in inspect.getsource(online)


def check_server_entry_and_options() -> None:
    from vllm.entrypoints.launchers.api_server.entry import main as entry
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from agl_grpc.interceptor.inside.serve import engine_arguments

    assert callable(entry)
    assert "await run_server_worker(" in inspect.getsource(run_server)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(engine_arguments("m", ["--port", "1"]))
    assert parsed.logprobs_mode == "processed_logprobs"
    assert parsed.generation_config == "vllm"
    assert parsed.worker_extension_cls.endswith("WeightSwapExtension")
    assert parsed.middleware[-1].endswith("AttributionMiddleware")


def check_help_shows_our_options_and_vllms() -> None:
    import contextlib
    import io

    from agl_grpc_cli.main import main as command

    printed, given = io.StringIO(), sys.argv
    sys.argv = ["agl-grpc", "vllm", "serve", "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            command()
    finally:
        sys.argv = given
    for option in ("--running-on-swap", "--max-model-len", "--tensor-parallel-size"):
        assert option in printed.getvalue(), option


def check_validation_error() -> None:
    from vllm.exceptions import VLLMClientError

    from agl_grpc.interceptor.inside.runtime import _bad_request, _unavailable

    assert isinstance(_bad_request("why"), VLLMClientError)
    assert _unavailable("why").status_code == 503  # type: ignore[attr-defined]  # vLLM's error


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for name, check in (*globals().items(), *vars(vllm_contract_logprobs).items())
    if name.startswith("check_")
}


def main() -> None:
    """Run all checks; print their tracebacks (empty: passed) as one JSON object."""
    answers, sys.stdout = sys.stdout, sys.stderr
    outcomes = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcomes[name] = ""
        except Exception:  # whatever failed is the outcome
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes), file=answers)


if __name__ == "__main__":
    main()

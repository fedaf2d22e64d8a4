"""The class-level loader and what it needs, against recorded signatures of vLLM's versions.

The files of `vllm_recorded/` were recorded from the versions' wheels by `vllm_signatures`; 0.32.0 is compared
with the installed engine as well. Recorded is not run: docs/engines.md says which version was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.interceptor import vllm_signatures
from tests.support.environments import engine_python

VERSIONS = sorted(path.stem for path in vllm_signatures.RECORDED.glob("*.json"))


@pytest.fixture(params=VERSIONS)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One version as it was recorded."""
    path = vllm_signatures.RECORDED / f"{request.param}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return {**found, "version": tuple(int(part) for part in request.param.split("."))}


def parameters(recorded: dict[str, Any], owner: str, method: str) -> list[str]:
    found: list[str] = recorded[owner]["methods"][method]
    return found


def test_four_versions_are_recorded() -> None:
    assert VERSIONS == ["0.24.0", "0.26.0", "0.29.0", "0.32.0"]


def test_the_funnel_and_the_engine_client(recorded: dict[str, Any]) -> None:
    generate = parameters(recorded, "AsyncLLM", "generate")
    assert generate[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert "lora_request" in generate
    assert {"mode", "clear_cache"} <= set(parameters(recorded, "AsyncLLM", "pause_generation"))
    assert parameters(recorded, "AsyncLLM", "resume_generation") == ["self"]
    assert parameters(recorded, "AsyncLLM", "collective_rpc") == [
        "self",
        "method",
        "timeout",
        "args",
        "kwargs",
    ]
    assert "shutdown" in recorded["AsyncLLM"]["methods"]
    assert {"output_processor", "engine_core", "model_config"} <= set(recorded["AsyncLLM"]["attributes"])


def test_requests_and_their_states(recorded: dict[str, Any]) -> None:
    add = parameters(recorded, "OutputProcessor", "add_request")
    assert add == ["self", "request", "prompt", "parent_req", "request_index", "queue"]
    assert parameters(recorded, "OutputProcessor", "process_outputs")[:2] == ["self", "engine_core_outputs"]
    assert "request_states" in recorded["OutputProcessor"]["attributes"]
    assert parameters(recorded, "RequestOutputCollector", "put") == ["self", "output"]
    needed = {
        "request_id", "external_req_id", "request_index", "prompt_token_ids", "logprobs_processor",
        "detokenizer", "queue", "routed_experts_chunks",
    }  # fmt: skip
    assert needed <= set(recorded["RequestState"]["attributes"])
    assert {"output_token_ids", "num_output_tokens"} <= set(recorded["IncrementalDetokenizer"]["methods"])
    assert parameters(recorded, "LogprobsProcessor", "_update_sample_logprobs") == ["self", "logprobs_lists"]
    assert {"logprobs", "cumulative_logprob"} <= set(recorded["LogprobsProcessor"]["attributes"])


def test_what_a_continued_request_needs(recorded: dict[str, Any]) -> None:
    request = {
        "prompt_token_ids", "sampling_params", "mm_features", "prompt_embeds", "resumable", "external_req_id"
    }  # fmt: skip
    assert request <= set(recorded["EngineCoreRequest"]["attributes"])
    assert {"request_id", "finish_reason"} <= set(recorded["EngineCoreOutput"]["attributes"])
    assert '"abort"' in recorded["finish reasons"]
    sampling = {"max_tokens", "min_tokens", "seed", "prompt_logprobs", "structured_outputs", "extra_args"}
    assert sampling <= set(recorded["SamplingParams"]["attributes"])
    assert parameters(recorded, "EngineCoreClient", "add_request_async") == ["self", "request"]
    assert parameters(recorded, "EngineCoreClient", "abort_requests_async") == ["self", "request_ids"]


def test_what_is_recorded_of_outputs(recorded: dict[str, Any]) -> None:
    output = {"index", "token_ids", "finish_reason", "stop_reason"}
    assert output <= set(recorded["CompletionOutput"]["attributes"])
    assert {"prompt_token_ids", "outputs", "finished", "metrics"} <= set(
        recorded["RequestOutput"]["attributes"]
    )
    stats = {"queued_ts", "scheduled_ts", "first_token_latency"}
    assert stats <= set(recorded["RequestStateStats"]["attributes"])
    assert "VLLMValidationError" in recorded["exceptions"]
    # By which sampled logprobs are asked for as numbers, and by which they come.
    assert "extra_args" in recorded["SamplingParams"]["attributes"]
    assert {"kv_transfer_params", "new_logprobs"} <= set(recorded["EngineCoreOutput"]["attributes"])


def test_what_differs_between_versions_is_what_the_code_expects(recorded: dict[str, Any]) -> None:
    version = recorded["version"]
    assert recorded["general plugins are loaded by EngineArgs"]
    assert recorded["endpoint plugins"] == (version >= (0, 26))
    assert ("update_weight_version" in recorded["AsyncLLM"]["methods"]) == (version >= (0, 29))
    assert ("weight_version_starts" in recorded["RequestState"]["attributes"]) == (version >= (0, 32))
    assert ("RetryableRequestError" in recorded["exceptions"]) == (version >= (0, 32))
    assert ("GracefulHTTPError" in recorded["exceptions"]) == (version >= (0, 29))
    assert recorded["our server entry"] == (version >= (0, 29))


@pytest.mark.e2e
def test_the_record_of_the_installed_version_is_true() -> None:
    packages = next(Path(engine_python()).parents[1].glob("lib/python*/site-packages"))
    recorded = json.loads((vllm_signatures.RECORDED / "0.32.0.json").read_text())
    assert vllm_signatures.read(packages) == recorded

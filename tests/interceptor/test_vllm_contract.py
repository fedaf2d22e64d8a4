"""The vLLM internals that the interceptor relies on are as they were when it was written."""

from __future__ import annotations

import json

import pytest

from tests.support.environments import run_in_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CHECKS = [
    "generate",
    "swap_methods",
    "output_processor",
    "request_state",
    "sampled_logprobs_take_the_place_of_tables",
    "sampled_logprobs_travel_as_numbers",
    "a_step_of_captured_calls_alone_cuts_nothing_out",
    "ranks_are_counted_for_those_who_see_them_only",
    "outputs",
    "sampling_parameters",
    "seeds_on_a_cpu",
    "what_continues_an_aborted_request",
    "layerwise_reload",
    "worker_extension",
    "plugin_protocol",
    "middleware_is_outermost",
    "beam_search_request_ids",
    "server_entry_and_options",
    "help_shows_our_options_and_vllms",
    "validation_error",
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Traceback of each check; empty where it passed."""
    found: dict[str, str] = json.loads(run_in_engine("tests.interceptor.vllm_contract").splitlines()[-1])
    assert sorted(found) == sorted(CHECKS)
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_vllm_internal(outcomes: dict[str, str], check: str) -> None:
    assert outcomes[check] == ""

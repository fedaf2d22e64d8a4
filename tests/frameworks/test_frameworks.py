"""Each framework's agent works unchanged, and each of its model calls is recorded with its exact tokens."""

from __future__ import annotations

from typing import Any

import pytest

from agl_grpc.model import ModelCall
from tests.frameworks.conftest import EXAMPLES, Done
from tests.frameworks.tool_model import ANSWER, CALL
from tests.support.torch_client import TorchClient

# The first test waits for the model, the engine and all agents.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HEARD = "It is sunny in Paris now."


def model_calls(done: Done, rollout_id: str) -> list[ModelCall]:
    """The rollout's calls, in their order."""
    spans = sorted(done.spans[rollout_id], key=lambda span: span.start_time_ns)
    return [span.model_call for span in spans if span.model_call is not None]


def row(call: ModelCall) -> dict[str, Any]:
    """What the call has sampled, for the torch helper."""
    (choice,) = call.choices
    return {
        "prompt": call.prompt_token_ids.tolist(),
        "response": choice.token_ids.tolist(),
        "temperature": call.sampling["temperature"],
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_agent_does_its_task(done: Done, name: str) -> None:
    for rollout in done.rollouts[name]:
        assert rollout.status.value == "succeeded", f"{rollout.failure}\n{done.logs[name][-3000:]}"
        assert done.rewards[rollout.rollout_id] == [1.0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_call_is_recorded_with_its_exact_tokens(
    done: Done, torch_client: TorchClient, name: str
) -> None:
    model = str(done.model)
    for rollout in done.rollouts[name]:
        calls = model_calls(done, rollout.rollout_id)
        rows = [row(call) for call in calls]
        said = torch_client.call("text", model=model, rows=rows)
        assert said == [CALL, ANSWER]  # the tool is called, then its result is told

        asked = [{"prompt": [], "response": one["prompt"]} for one in rows]
        prompts = torch_client.call("text", model=model, rows=asked)
        assert all(rollout.input["question"] in prompt for prompt in prompts)
        assert [HEARD in prompt for prompt in prompts] == [False, True]

        # Another implementation gives these tokens after these prompts the same probabilities.
        expected = torch_client.call("logprobs", model=model, rows=rows)
        for call, logprobs in zip(calls, expected, strict=True):
            assert call.choices[0].logprobs.tolist() == pytest.approx(logprobs, abs=1e-3)
            assert call.untrainable_reason == ""


@pytest.mark.parametrize("name", EXAMPLES)
def test_everything_stands_under_the_right_attempt(done: Done, name: str) -> None:
    for rollout in done.rollouts[name]:
        spans = done.spans[rollout.rollout_id]
        assert {span.attempt_id for span in spans} == {rollout.latest_attempt_id}
        assert not any(span.late for span in spans)


def test_no_call_is_missing(done: Done) -> None:
    recorded = sum(len(model_calls(done, rollout_id)) for rollout_id in done.spans)
    assert recorded == done.served == 2 * sum(map(len, done.rollouts.values()))

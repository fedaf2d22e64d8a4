"""An engine and the real store that it reports to."""

from __future__ import annotations

import time
from typing import Any

import grpc
import httpx
import pytest

from agl_grpc.model.rollout import SEED_LABEL
from agl_grpc.v1 import (
    policy_pb2,
    span_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
    trainer_service_pb2,
    trainer_service_pb2_grpc,
)
from tests.interceptor.engine import Engine
from tests.support.store_process import StoreProcess
from tests.support.torch_client import TorchClient

HELLO = [{"role": "user", "content": "hello world"}]


class Together:
    """An engine and the store that it reports to."""

    def __init__(self, server: StoreProcess, running: Engine, channel: grpc.Channel) -> None:
        self.server = server
        self.running = running
        self.store: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        self.trainer: Any = trainer_service_pb2_grpc.TrainerServiceStub(channel)
        self.credential = ""

    def start_rollout(self, seed: str = "") -> tuple[str, str]:
        """A rollout with one attempt without a lease; ``seed`` is its calls'."""
        request = store_service_pb2.StartRolloutRequest(run_id="run-1")
        if seed:
            request.rollout.labels.add(key=SEED_LABEL, value=seed)
        answer = self.store.StartRollout(request, wait_for_ready=True)
        self.credential = answer.attempt_credential
        return answer.rollout.rollout.rollout_id, answer.rollout.attempt.attempt_id

    def calls(self, rollout: str, count: int) -> list[span_pb2.StoredSpan]:
        request = store_service_pb2.ListSpansRequest(rollout_id=rollout, page_size=1000)
        until = time.monotonic() + 30
        while True:
            found = list(self.store.ListSpans(request, wait_for_ready=True).spans)
            if len(found) >= count or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def ask(self, rollout: str, attempt: str, **more: Any) -> dict[str, Any]:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 10, "return_token_ids": True, **more}
        url = f"{self.running.base(rollout, attempt)}/v1/chat/completions"
        response = httpx.post(url, json=body, timeout=120)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def samples_from(self, client: TorchClient, version: int, weights: str, asked: str = "tiny") -> None:
        """Assert that the engine samples from these weights where it is asked for this model, and says so."""
        rollout, attempt = self.start_rollout()
        self.ask(rollout, attempt, model=asked)
        (stored,) = self.calls(rollout, 1)
        choice = stored.span.model_call.choices[0]
        assert [run.policy_version for run in choice.policy_runs] == [version]
        rows = [{"prompt": list(stored.span.model_call.prompt.token_ids), "response": list(choice.token_ids)}]
        model = str(self.running.model)
        (expected,) = client.call("logprobs", model=model, weights=weights, rows=rows)
        assert list(choice.logprobs) == pytest.approx(expected, abs=1e-4)

    def version(
        self,
        number: int,
        phase: int,
        limit: float = 60.0,
        engine_id: str = "engine-1",
        model: str = "tiny",
    ) -> policy_pb2.EngineState:
        """The engine's state of a policy version once it has reached a phase."""
        request = trainer_service_pb2.GetPolicyVersionRequest(
            run_id="run-1", model=model, policy_version=number
        )
        until = time.monotonic() + limit
        while True:
            version = self.trainer.GetPolicyVersion(request, wait_for_ready=True).policy_version
            for state in version.engine_states:
                if (state.phase, state.engine_id) == (phase, engine_id):
                    return state
            assert time.monotonic() < until, version
            time.sleep(0.02)

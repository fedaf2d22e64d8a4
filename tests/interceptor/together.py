"""An engine and the real store that it reports to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from agl_grpc.model.rollout import SEED_LABEL
from agl_grpc.v1 import (
    policy_pb2,
    rollout_pb2,
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

    def start_rollout(
        self, seed: str = "", config: rollout_pb2.RolloutConfig | None = None
    ) -> tuple[str, str]:
        """A rollout with one attempt without a lease; ``seed`` is its calls'."""
        request = store_service_pb2.StartRolloutRequest(run_id="run-1")
        request.rollout.config.CopyFrom(config or rollout_pb2.RolloutConfig())
        if seed:
            request.rollout.labels.add(key=SEED_LABEL, value=seed)
        answer = self.store.StartRollout(request, wait_for_ready=True)
        self.credential = answer.attempt_credential
        return answer.rollout.rollout.rollout_id, answer.rollout.attempt.attempt_id

    def calls(self, rollout: str, count: int, limit: float = 30.0) -> list[span_pb2.StoredSpan]:
        """The rollout's spans once there are `count`; what there is by then after `limit` seconds."""
        listed = store_service_pb2.ListSpansRequest(rollout_id=rollout, page_size=1000)
        watched = store_service_pb2.WatchSpansRequest(run_id="*", rollout_ids=[rollout])
        found: list[span_pb2.StoredSpan] = []
        for _ in _looks(self.store.WatchSpans, watched, limit):
            found = list(self.store.ListSpans(listed, wait_for_ready=True).spans)
            if len(found) >= count:
                break
        return found

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
        asked = trainer_service_pb2.GetPolicyVersionRequest(
            run_id="run-1", model=model, policy_version=number
        )
        watched = trainer_service_pb2.WatchPolicyVersionsRequest(run_id="run-1", model=model)
        version = policy_pb2.PolicyVersion()
        for _ in _looks(self.trainer.WatchPolicyVersions, watched, limit):
            version = self.trainer.GetPolicyVersion(asked, wait_for_ready=True).policy_version
            for state in version.engine_states:
                if (state.phase, state.engine_id) == (phase, engine_id):
                    return state
        raise AssertionError(f"phase {phase} of {engine_id} not seen within {limit} s: {version}")


def _looks(watch: Any, request: Any, limit: float) -> Iterator[None]:
    """One at once and one after each change that the watch tells of, for `limit` seconds, whatever becomes of
    the store.
    """
    until = time.monotonic() + limit
    while (left := until - time.monotonic()) > 0:
        stream = watch(request, timeout=left, wait_for_ready=True)
        try:
            # The first message says from where it watches.
            for _ in stream:
                yield
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
        finally:
            stream.cancel()

"""Ray's start on a machine that is too busy for it; Ray itself stands aside: how it fails is what counts."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agl_grpc.learner.errors import LearnerError
from agl_grpc.learner.verl import ray_runtime
from agl_grpc.learner.verl.ray_runtime import local_ray

SLOW = "The current node timed out during startup. This could happen because ..."


class Ray(ModuleType):
    """Fails to start in the given ways, then starts."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("ray")
        self.failures = list(failures)
        self.shutdowns = 0
        self.arguments: dict[str, object] = {}
        self.gpus = 2
        # Names on the cluster and its free GPUs, each time that one looks; the last ones stay.
        self.named: list[list[dict[str, str]]] = [[]]
        self.free = [self.gpus]
        self.util = SimpleNamespace(list_named_actors=lambda *, all_namespaces: self._next(self.named))

    @staticmethod
    def _next(seen: list[Any]) -> Any:
        return seen.pop(0) if len(seen) > 1 else seen[0]

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": float(self.gpus)}

    def available_resources(self) -> dict[str, float]:
        return {"GPU": float(self._next(self.free))}

    def init(self, **arguments: object) -> None:
        self.arguments = arguments
        if self.failures:
            raise self.failures.pop(0)

    def shutdown(self) -> None:
        self.shutdowns += 1


@pytest.mark.parametrize(
    ("failures", "error"),
    [
        ([Exception(SLOW)] * 2, None),
        ([Exception(SLOW)] * 3, "too busy"),
        ([ValueError("another defect")], "another defect"),
    ],
)
def test_a_slow_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, failures: list[Exception], error: str | None
) -> None:
    ray = Ray(*failures)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_runtime, "worker_environment", lambda _device: {})
    if error is None:
        with local_ray(device="cuda", gpus=1):
            assert ray.shutdowns == len(failures)
        assert ray.shutdowns == len(failures) + 1
    else:
        kind = LearnerError if error == "too busy" else ValueError
        with pytest.raises(kind, match=error), local_ray(device="cuda", gpus=1):
            pytest.fail("it did not start")


@pytest.mark.parametrize(("address", "starts"), [("", True), ("head:6379", False)])
def test_a_cluster_that_runs_already_is_joined_not_started(
    monkeypatch: pytest.MonkeyPatch, address: str, starts: bool
) -> None:
    ray = Ray()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_runtime, "worker_environment", lambda _device: {"A": "1"})
    with local_ray(device="cuda", gpus=2, address=address):
        assert ray.arguments["address"] == (address or "local")
        assert ("num_gpus" in ray.arguments) is starts
        assert ray.arguments["runtime_env"] == {"env_vars": {"A": "1"}}


QUEUE = {"namespace": "transfer_queue", "name": "TransferQueueController"}


def _join(monkeypatch: pytest.MonkeyPatch, ray: Ray, seconds: float, *, queue: bool = True) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_runtime, "worker_environment", lambda _device: {})
    monkeypatch.setattr(ray_runtime, "_CLEARING_SECONDS", seconds)
    monkeypatch.setattr(ray_runtime, "_LOOK_SECONDS", 0.0)
    with local_ray(device="cuda", gpus=2, address="head:6379", queue=queue):
        pass


def test_a_trainer_waits_until_a_killed_one_is_cleared_away(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    ray.named, ray.free = [[QUEUE], [QUEUE], []], [0, 1, 2]
    _join(monkeypatch, ray, 60.0)
    assert (ray.named, ray.free) == ([[]], [2])


def test_a_trainer_whose_rows_are_its_own_joins_beside_one_with_a_transfer_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray()
    ray.named = [[QUEUE]]
    _join(monkeypatch, ray, 0.0, queue=False)
    assert ray.shutdowns == 1


@pytest.mark.parametrize(
    ("gpus", "named", "free", "error"),
    [
        (2, [QUEUE], 2, "another trainer's TransferQueue is there after 0 s"),
        (2, [], 1, "1 of the 2 GPUs that it needs are free after 0 s"),
        (1, [], 1, "the Ray cluster has 1 GPUs and the trainer needs 2: add nodes"),
    ],
)
def test_a_cluster_without_room_is_named_and_left(
    monkeypatch: pytest.MonkeyPatch, gpus: int, named: list[dict[str, str]], free: int, error: str
) -> None:
    ray = Ray()
    ray.gpus, ray.named, ray.free = gpus, [named], [free]
    with pytest.raises(LearnerError, match=error):
        _join(monkeypatch, ray, 0.0)
    assert ray.shutdowns == 1

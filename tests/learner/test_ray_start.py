"""Ray's start on a machine that is too busy for it; Ray itself stands aside: how it fails is what counts."""

from __future__ import annotations

import sys
from types import ModuleType

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

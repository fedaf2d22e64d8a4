"""Agents as classes and as functions."""

from __future__ import annotations

import functools
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from agl_grpc.agent import (
    FunctionalLitAgent,
    LitAgent,
    PublishedResources,
    ResourceMissing,
    RolloutRawResult,
    llm_rollout,
    prompt_rollout,
    rollout,
)
from agl_grpc.model import LLM, Attempt, AttemptedRollout, NamedResources, PromptTemplate, ProxyLLM, Rollout

WORK = AttemptedRollout(
    rollout_id="ro-1",
    attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1),
    attempt_credential="secret",
)
RESOURCES: NamedResources = {
    "prompt": PromptTemplate(template="{x}"),
    "main": ProxyLLM(endpoint="http://h:1/v1", model="first"),
    "other": LLM(endpoint="http://o/v1", model="second"),
}


@llm_rollout
def with_llm(task: Any, llm: LLM) -> float:
    """A module's agent."""
    assert llm.endpoint == "http://h:1/rollout/ro-1/attempt/at-1/v1"
    return float(task)


@llm_rollout(strip_proxy=False)
async def with_proxy(task: Any, llm: LLM, rollout: Rollout) -> str:
    assert isinstance(llm, ProxyLLM)
    return llm.get_base_url(rollout.rollout_id, "at-1")


@prompt_rollout
def with_prompt(task: Any, prompt_template: PromptTemplate, rollout: Rollout) -> str:
    return prompt_template.format(x=task) + rollout.rollout_id


@rollout
async def with_everything(task: Any, resources: NamedResources) -> list[str]:
    return list(resources)


@rollout
def by_name(task: Any, llm: LLM, retries: int = 3) -> tuple[str, str | None, int]:
    return llm.model, llm.api_key, retries


async def test_functions_get_the_resource_that_they_name() -> None:
    assert with_llm.rollout(3, RESOURCES, WORK) == 3.0
    assert await with_proxy.rollout_async(None, RESOURCES, WORK) == "http://h:1/rollout/ro-1/attempt/at-1/v1"
    assert with_prompt.rollout("t", RESOURCES, WORK) == "tro-1"
    assert await with_everything.rollout_async(None, RESOURCES, WORK) == ["prompt", "main", "other"]
    assert by_name.rollout(None, RESOURCES, WORK) == ("first", "secret", 3)


async def test_training_and_validation_call_the_same_function() -> None:
    assert with_llm.training_rollout(1, RESOURCES, WORK) == with_llm.validation_rollout(1, RESOURCES, WORK)
    assert await with_everything.training_rollout_async(None, RESOURCES, WORK)
    assert await with_everything.validation_rollout_async(None, RESOURCES, WORK)


async def test_sync_and_async_are_told_apart() -> None:
    assert not with_llm.is_async()
    assert with_proxy.is_async()
    with pytest.raises(RuntimeError, match="with_llm is not async; call rollout"):
        await with_llm.rollout_async(1, RESOURCES, WORK)
    with pytest.raises(RuntimeError, match="with_proxy is async; await rollout_async"):
        with_proxy.rollout(1, RESOURCES, WORK)


def test_an_agent_stays_the_function_that_it_was() -> None:
    assert with_prompt("t", PromptTemplate(template="<{x}>"), WORK) == "<t>ro-1"
    assert with_llm.__name__ == "with_llm"
    assert with_llm.__doc__ == "A module's agent."


def test_agents_of_modules_cross_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(with_llm)) is with_llm

    @rollout
    def local(task: Any, llm: LLM) -> None: ...

    with pytest.raises(ValueError, match="cannot be imported; define it at the top of a module"):
        pickle.dumps(local)


@rollout
def positional(task: Any, rollout: Rollout, llm: LLM, /) -> str:
    return f"{task} {rollout.rollout_id} {llm.model}"


@rollout
def by_keyword(*rest: Any, task: Any, llm: LLM, **more: Any) -> str:
    return f"{task} {llm.model} {rest} {more}"


class _Callable:
    async def __call__(self, task: Any, llm: LLM) -> str:
        return f"{task} {llm.model}"


def _with_memory(task: Any, llm: LLM, memory: list[Any]) -> int:
    return len(memory)


async def test_every_kind_of_parameter_and_callable() -> None:
    assert positional.rollout("t", RESOURCES, WORK) == "t ro-1 first"
    assert by_keyword.rollout("t", RESOURCES, WORK) == "t first () {}"
    called = rollout(_Callable())
    assert called.is_async()
    assert await called.rollout_async("t", RESOURCES, WORK) == "t first"
    assert llm_rollout(functools.partial(_with_memory, memory=[1])).rollout("t", RESOURCES, WORK) == 1


def test_what_is_no_function_is_refused_with_the_right_forms() -> None:
    def stream(task: Any, llm: LLM) -> Iterator[int]:
        yield 1

    async def stream_async(task: Any, llm: LLM) -> AsyncIterator[int]:
        yield 1

    for wrong, text in (
        (stream, "stream is a generator"),
        (stream_async, "stream_async is a generator"),
        ("agent", "'agent' cannot be"),
        (dict.fromkeys, r"fromkeys\(.*cannot be"),
    ):
        with pytest.raises(TypeError, match=rf"{text}.*allowed, sync or async: \(task, llm\)"):
            llm_rollout(wrong)  # type: ignore[arg-type, call-overload]  # that is what is refused
    for decorator, forms in (
        (prompt_rollout, r"\(task, prompt_template\) or \(task, prompt_template, rollout\)$"),
        (rollout, r"\(task, resources\).*\(task, llm\).*\(task, prompt_template, rollout\)$"),
    ):
        with pytest.raises(TypeError, match=forms):
            decorator(_no_resource)


def _no_task(llm: LLM) -> None: ...
def _no_resource(task: Any) -> None: ...
def _two_resources(task: Any, llm: LLM, prompt_template: PromptTemplate) -> None: ...
def _task_second(llm: LLM, task: Any) -> None: ...
def _unknown_need(task: Any, llm: LLM, database: Any) -> None: ...


@pytest.mark.parametrize("function", [_no_task, _no_resource, _two_resources, _task_second, _unknown_need])
@pytest.mark.parametrize("decorator", [rollout, llm_rollout])
def test_wrong_signatures_are_refused_with_the_right_ones(
    function: Callable[..., None], decorator: Callable[[Any], FunctionalLitAgent]
) -> None:
    with pytest.raises(
        TypeError, match=rf"{function.__name__}\(.*cannot be an agent; allowed.*\(task, llm\)"
    ):
        decorator(function)


def test_missing_resources_and_attempts_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"needs a LLM, and none is published; published: p \(PromptTemplate\)"
    ):
        with_llm.rollout(1, {"p": PromptTemplate(template="")}, WORK)
    with pytest.raises(ValueError, match="published: nothing"):
        with_prompt.rollout(1, {}, WORK)
    with pytest.raises(ResourceMissing, match=r"needs a resource named 'judge'.*published: nothing"):
        PublishedResources()["judge"]
    with pytest.raises(TypeError, match="rollout ro-2 has no attempt"):
        with_llm.rollout(1, RESOURCES, Rollout(rollout_id="ro-2"))


class _Twins(LitAgent[int]):
    def rollout(self, task: int, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        return float(task)

    def validation_rollout(self, task: int, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        return -float(task)


class _Async(LitAgent[int]):
    async def training_rollout_async(
        self, task: int, resources: NamedResources, rollout: Rollout
    ) -> RolloutRawResult:
        return float(task)


class _Nothing(LitAgent[int]):
    pass


async def test_classes_override_what_differs() -> None:
    twins = _Twins()
    assert (twins.training_rollout(2, {}, WORK), twins.validation_rollout(2, {}, WORK)) == (2.0, -2.0)
    assert not twins.is_async()
    assert _Async().is_async()
    assert await _Async().training_rollout_async(1, {}, WORK) == 1.0
    with pytest.raises(NotImplementedError, match="_Nothing does not say how to do a task"):
        _Nothing().training_rollout(1, {}, WORK)


class _Mixed(LitAgent[int]):
    def rollout(self, task: int, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        return 1.0

    async def validation_rollout_async(
        self, task: int, resources: NamedResources, rollout: Rollout
    ) -> RolloutRawResult:
        return 2.0


async def test_sync_training_goes_with_async_validation() -> None:
    train, train_is_async = _Mixed().method_of("training")
    validate, validate_is_async = _Mixed().method_of("validation")
    assert (train_is_async, validate_is_async) == (False, True)
    assert (train(1, {}, WORK), await validate(1, {}, WORK)) == (1.0, 2.0)
    method, is_async = with_proxy.method_of("training")
    assert is_async
    assert method == with_proxy.training_rollout_async


def test_an_agent_that_was_run_here_still_crosses_to_other_processes() -> None:
    class Runner:
        tracer = None

    runner = Runner()
    agent = _Twins(trained_agents="solver.*")
    agent.set_runner(runner)
    agent.set_trainer(runner)
    copy = pickle.loads(pickle.dumps(agent))
    assert copy.trained_agents == "solver.*"
    with pytest.raises(ValueError, match="no runner"):
        copy.get_runner()


def test_trainer_and_runner_are_held_weakly() -> None:
    class Runner:
        tracer = "a tracer"

    agent, runner = _Twins(), Runner()
    with pytest.raises(ValueError, match="the agent has no runner"):
        agent.get_runner()
    agent.set_runner(runner)
    assert (agent.runner, agent.tracer) == (runner, "a tracer")
    del runner
    with pytest.raises(ValueError, match="no runner"):
        agent.get_runner()
    trainer = Runner()
    agent.set_trainer(trainer)
    assert agent.trainer is trainer

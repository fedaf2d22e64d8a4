"""What a program that is the agent is told: its task, and an environment that names model and attempt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import orjson

from agl_grpc.agent import LitAgent
from agl_grpc.model import LLM, AttemptedRollout, Failure, FailureKind, NamedResources
from agl_grpc.runner.failures import failure_of
from agl_grpc.runner.outcome import BadResult, Outcome, read_result

TAIL_BYTES = 16 * 1024
"""How much of a program's output is kept: its end."""

Environment = dict[str, str]


class ProgramAgent(LitAgent[Any]):
    """An agent that is a program of any kind; a subclass says how it is run.

    `store` is the store's address, for programs that speak to it.
    """

    def __init__(self, store: str) -> None:
        super().__init__()
        self._store = store

    async def close(self) -> None:
        """Lets go of what it holds; by default nothing."""

    def environment(self, resources: NamedResources, rollout: AttemptedRollout) -> Environment:
        """Rollout, attempt, credential, and the first model endpoint under the names that SDKs read."""
        values = {
            "AGL_GRPC_STORE": self._store,
            "AGL_GRPC_RUN_ID": rollout.run_id,
            "AGL_GRPC_ROLLOUT_ID": rollout.rollout_id,
            "AGL_GRPC_ATTEMPT_ID": rollout.attempt.attempt_id,
            "AGL_GRPC_CREDENTIAL": rollout.attempt_credential,
            "AGL_GRPC_MODE": rollout.mode.value if rollout.mode else "",
            "AGL_GRPC_WORKER_ID": self.runner.worker_id,
        }
        endpoint = next((one for one in resources.values() if isinstance(one, LLM)), None)
        return values if endpoint is None else values | _model(endpoint, rollout)


def _model(llm: LLM, rollout: AttemptedRollout) -> Environment:
    key = llm.api_key or rollout.attempt_credential or "none"
    return {
        "AGL_GRPC_BASE_URL": llm.endpoint,
        "AGL_GRPC_MODEL": llm.model,
        "OPENAI_BASE_URL": llm.endpoint,
        "OPENAI_API_BASE": llm.endpoint,
        "OPENAI_API_KEY": key,
        "OPENAI_MODEL": llm.model,
        # Anthropic's clients append /v1 themselves.
        "ANTHROPIC_BASE_URL": llm.endpoint.removesuffix("/").removesuffix("/v1"),
        "ANTHROPIC_API_KEY": key,
        "ANTHROPIC_MODEL": llm.model,
    }


def task_bytes(task: Any) -> bytes:
    """The task as a program reads it: a text as it is, everything else as JSON."""
    return task.encode() if isinstance(task, str) else orjson.dumps(task, option=orjson.OPT_NON_STR_KEYS)


def resources_bytes(resources: NamedResources) -> bytes:
    """All resources by name, as JSON: their fields, and their type as `resource_type`."""
    described = {
        name: {"resource_type": type(one).resource_type, **dataclasses.asdict(one)}
        for name, one in resources.items()
    }
    return orjson.dumps(described)


def outcome_of(rewards: bytes, output: Mapping[str, Any]) -> Outcome:
    """A program's success: a number, or a JSON object of named numbers, or nothing, is its reward."""
    try:
        outcome = read_result(_read_rewards(rewards))
    except BadResult as error:
        outcome = Outcome(failure=failure_of(error))
    outcome.output = dict(output)
    return outcome


def failed(
    type_: str, message: str, output: Mapping[str, Any], kind: FailureKind = FailureKind.AGENT
) -> Outcome:
    """A program's failure; the end of its output, `output_tail`, tells the story."""
    detail = str(output.get("output_tail", ""))
    last = next((line for line in reversed(detail.splitlines()) if line.strip()), "")
    return Outcome(
        failure=Failure(
            kind=kind, type=type_, message=f"{message}: {last}" if last else message, detail=detail
        ),
        output=dict(output),
    )


def _read_rewards(text: bytes) -> Any:
    if not text.strip():
        return None
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadResult(f"the reward file holds neither a number nor a JSON object: {error}") from error
    if isinstance(found, int | float | dict) and not isinstance(found, bool):
        return found
    raise BadResult(f"the reward file holds a {type(found).__name__}; write a number or an object of numbers")

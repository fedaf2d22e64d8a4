"""verl's own reward workers as a grader: its rules, custom reward functions, reward models that are served.

verl computes rewards in its `RewardLoopWorker`s. Here they judge as every grader does: sealed attempts, under
a grader's credential, with retries, and a failure is kind GRADER. So batches and proofs know no other kind of
reward. verl would start a reward model's engine itself; engines run outside verl here, this one too.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import numpy as np
import ray
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.experimental.reward_loop import RewardLoopManager, migrate_legacy_reward_impl
from verl.experimental.reward_loop import reward_loop as verl_reward_loop
from verl.protocol import DataProto

from agl_grpc.client import StoreClient
from agl_grpc.grader.base import Grader
from agl_grpc.grader.combined import Graders
from agl_grpc.grader.conversation import Decode
from agl_grpc.grader.grade import Grade, GraderFailed
from agl_grpc.grader.submission import Submission
from agl_grpc.grader.worker import GraderWorker
from agl_grpc.learner.errors import ConfigError, LearnerError
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model.run import RunGrader

NAME = "verl"
"""The grader's name: its verdicts are the rewards of that name."""
# A reward model may have many answers before this one in its queue; verl's own request has no limit.
_TIMEOUT = 300.0
_CREDENTIAL_SECONDS = 365 * 24 * 3600.0
_AT_ONCE_PER_WORKER = 64
_TRUTHS = ("ground_truth", "answer")


def take_rewards(verl: DictConfig, endpoint: str) -> DictConfig | None:
    """Takes what concerns rewards out of verl's configuration, whose trainer then starts no reward worker.

    Args:
        verl: the composed configuration; changed.
        endpoint: where the reward model is served, such as ``http://HOST:8001``; empty = there is none.

    Returns:
        The configuration for verl's reward workers; None = rewards come from agents and graders alone.

    Raises:
        ConfigError: a reward model without an engine, or an engine without a reward model.
    """
    found: DictConfig = migrate_legacy_reward_impl(copy.deepcopy(verl))
    reward, model = found.reward, found.reward.reward_model
    with open_dict(verl):
        verl.reward.num_workers, verl.reward.reward_model.enable = 0, False
    if not reward.num_workers and (model.enable or reward.custom_reward_function.path):
        reward.num_workers = 1
    if model.enable:
        _check_model(model, endpoint)
    elif endpoint:
        raise ConfigError(
            f"reward_endpoint is {endpoint}, and verl uses no reward model: set "
            "reward.reward_model.enable=True and reward.reward_model.model_path"
        )
    return found if reward.num_workers else None


def _check_model(model: DictConfig, endpoint: str) -> None:
    if not model.model_path:
        raise ConfigError("reward.reward_model.enable=True needs reward.reward_model.model_path")
    if not endpoint:
        raise ConfigError(
            "reward.reward_model.enable=True: verl would start the model's engine itself; serve it "
            f"(`vllm serve {model.model_path} --runner pooling`) and name it in reward_endpoint"
        )
    if OmegaConf.is_missing(model.rollout, "name"):
        model.rollout.name = "vllm"


def _address(endpoint: str) -> str:
    """``HOST:PORT`` of a URL, the form in which verl's workers ask for it; empty for an empty one."""
    parts = urlsplit(endpoint)
    if endpoint and (parts.scheme != "http" or not parts.netloc or parts.path.strip("/")):
        raise ConfigError(f"reward_endpoint {endpoint!r} must be of the form http://HOST:PORT")
    return parts.netloc


class ServedRewardModel:
    """Stands where verl keeps the engines of a reward model: it runs elsewhere, and never sleeps."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get_router_address(self) -> str:
        """Where verl's workers ask for scores."""
        return self._address


def start_workers(settings: DictConfig, endpoint: str) -> list[Any]:
    """Starts verl's reward workers and waits until they have loaded function and tokenizers.

    Raises:
        ConfigError: one of them does not start, for example because its function cannot be found.
    """
    address = _address(endpoint)
    with patch.object(verl_reward_loop, "RewardModelManager", lambda *_: ServedRewardModel(address)):
        workers = list(RewardLoopManager(settings).reward_loop_workers)
    try:
        ray.get([worker.__ray_ready__.remote() for worker in workers])
    except ray.exceptions.RayError as error:
        raise ConfigError(f"verl's reward workers do not start: {_last_line(error)}") from error
    return workers


def version_of(settings: DictConfig) -> str:
    """Changes with whatever decides the verdicts: function (its file's content), manager, model."""
    reward = settings.reward
    digest = hashlib.blake2b(digest_size=6)
    function = reward.custom_reward_function
    for part in (OmegaConf.to_yaml(reward.reward_manager), OmegaConf.to_yaml(function)):
        digest.update(part.encode())
    if function.path and Path(function.path).is_file():
        digest.update(Path(function.path).read_bytes())
    if reward.reward_model.enable:
        digest.update(str(reward.reward_model.model_path).encode())
    return digest.hexdigest()


class VerlGrader(Grader):
    """Asks verl's reward workers in turn.

    The value is verl's score; numbers beside it (``reward_extra_info``) are components, the rest are notes.

    Args:
        workers: verl's ``RewardLoopWorker`` actors.
        version: see `version_of`.
    """

    def __init__(self, workers: Sequence[Any], version: str) -> None:
        super().__init__(name=NAME, version=version, timeout=_TIMEOUT, retries=1, isolated=False)
        self._turns = itertools.cycle(workers)

    async def grade(self, submission: Submission) -> Grade:
        """The score of the attempt's last answer.

        Raises:
            GraderFailed: no answer was captured, or verl's worker raised.
        """
        data = as_verl(submission)
        try:
            found: Mapping[str, Any] = await next(self._turns).compute_score.remote(data)
        except ray.exceptions.RayError as error:
            raise GraderFailed(
                f"verl's reward worker raised {_last_line(error)}", outcome="raised", detail=str(error)
            ) from None
        more = dict(found.get("reward_extra_info") or {})
        more.pop("score", None)  # the value again
        parts = {str(name): float(value) for name, value in more.items() if _is_number(value)}
        notes = {str(name): value for name, value in more.items() if name not in parts}
        return Grade(value=found["reward_score"], components=parts, notes=notes)


def as_verl(submission: Submission) -> DataProto:
    """A submission in the form in which verl's reward managers read rows of its own rollouts.

    The response is the last answer, the prompt everything before it. A task in verl's form is passed on as it
    is (``data_source``, ``reward_model.ground_truth``, ``extra_info``); of others ``ground_truth`` or
    ``answer`` is the truth. ``extra_info.task`` is always the whole task.

    Raises:
        GraderFailed: no answer was captured with its tokens.
    """
    calls = [span.model_call for span in submission.spans if span.model_call and span.model_call.choices]
    if not calls or not len(calls[-1].choices[0].token_ids):
        raise GraderFailed("no answer with tokens was captured", outcome="no_answer", final=True)
    prompt = torch.tensor([calls[-1].prompt_token_ids.tolist()])
    response = torch.tensor([calls[-1].choices[0].token_ids.tolist()])
    whole = torch.cat([prompt, response], dim=1)
    task = submission.input if isinstance(submission.input, Mapping) else {}
    extra = task.get("extra_info")
    others = {
        "data_source": str(task.get("data_source", "default")),
        "reward_model": {"ground_truth": _truth(task)},
        "extra_info": {**(extra if isinstance(extra, Mapping) else {}), "task": submission.input},
        # What was captured as tokens alone is one text, whoever said its parts.
        "raw_prompt": [
            {**message, "role": "user"} if message.get("role") == "prompt" else message
            for message in submission.messages[:-1]
        ],
    }
    return DataProto.from_dict(
        tensors={
            "prompts": prompt,
            "responses": response,
            "input_ids": whole,
            "attention_mask": torch.ones_like(whole),
            "position_ids": torch.arange(whole.shape[1])[None],
        },
        non_tensors={name: _alone(value) for name, value in others.items()},
    )


def _truth(task: Mapping[str, Any]) -> Any:
    model = task.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        return model["ground_truth"]
    return next((task[name] for name in _TRUTHS if name in task), None)


def _alone(value: Any) -> np.ndarray[Any, Any]:
    """An array of one object, whatever numpy would make of its parts."""
    column = np.empty(1, dtype=object)
    column[0] = value
    return column


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(float(value))


def _last_line(error: Exception) -> str:
    """Ray's errors end with the line of the error that was raised in the worker."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


class RewardLoop:
    """Has verl's reward workers judge the rollouts of the learner's run, until it is closed.

    The run names the grader from the beginning on, so that its rollouts are sealed with verl's verdict.

    Args:
        link: the line to the store; the verdicts have a line of their own, with a grader's credential.
        settings: what `take_rewards` answered.
        endpoint: where the reward model is served; empty = there is none.
        decode: the trained model's tokenizer.
    """

    def __init__(self, link: StoreLink, settings: DictConfig, endpoint: str, decode: Decode) -> None:
        workers = start_workers(settings, endpoint)
        self._link = link
        self._grader = VerlGrader(workers, version_of(settings))
        self._client = link.run(self._open())
        at_once = _AT_ONCE_PER_WORKER * len(workers)
        self._judging = GraderWorker(
            self._client, Graders((self._grader,)), concurrency=at_once, decode=decode
        )

    async def _open(self) -> StoreClient:
        """Names the grader in the run, beside those that are there; answers a client that may only judge."""
        client = self._link.client
        run = await client.get_run_by_id(client.run_id)
        graders = list(run.graders) if run is not None else []
        mine = next((one for one in graders if one.name == NAME), RunGrader(NAME))
        others = [one for one in graders if one.name != NAME]
        mine = RunGrader(NAME, self._grader.version, mine.weight)
        await client.update_run(client.run_id, graders=[*others, mine])
        credential = await client.create_grader_credential(lifetime_seconds=_CREDENTIAL_SECONDS)
        return StoreClient(client.target, run_id=client.run_id, credential=credential, retry=self._link.retry)

    def start(self, deliver: Callable[[BaseException], None]) -> None:
        """Judges from now on; ``deliver`` is told of the error that ends it."""

        def ended(task: Future[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                deliver(LearnerError(f"verl's reward workers can judge no longer: {error}"))

        self._link.start(self._judging.run()).add_done_callback(ended)

    def close(self) -> None:
        """Ends what is under way."""
        self._link.run(self._close())

    async def _close(self) -> None:
        await self._judging.close()
        await self._client.close()

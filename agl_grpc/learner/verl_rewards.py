"""verl's own rewards: its reward functions, reward managers and reward models judge sealed attempts.

verl computes rewards in reward-loop workers. Here each of them is asked by a grader worker that runs beside
the trainer: what verl says goes to the store as the verdict of the grader `verl`, like every other grader's,
before the rollout is sealed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agl_grpc.client import StoreClient
from agl_grpc.grader import Grade, Grader, GraderFailed, Graders, GraderWorker, Submission
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model import RunGrader
from agl_grpc.model.model_call import Choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from agl_grpc.grader.conversation import Decode

NAME = "verl"
"""The grader's name, and that of its reward."""

_LIFETIME = 365 * 24 * 3600.0


def asks_verl(reward: Mapping[str, Any]) -> bool:
    """Whether verl's `reward` section names a reward function, a reward model, or a manager of the user's."""
    function = reward.get("custom_reward_function") or {}
    model = reward.get("reward_model") or {}
    manager = reward.get("reward_manager") or {}
    return bool(function.get("path") or model.get("enable") or manager.get("source") == "importlib")


def version_of(reward: Mapping[str, Any]) -> str:
    """A version that changes when the function's file, the model's path or the manager does."""
    function = reward.get("custom_reward_function") or {}
    parts = [str(function.get("name")), str((reward.get("reward_model") or {}).get("model_path"))]
    manager = reward.get("reward_manager") or {}
    parts += [str(manager.get("name")), str((manager.get("module") or {}).get("path"))]
    digest = hashlib.sha256("\n".join(parts).encode())
    path = Path(str(function.get("path") or "")).expanduser()
    if path.is_file():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class VerlGrader(Grader):
    """Asks verl's reward-loop workers, in turn.

    They are given what verl gives them: prompt and response as tokens, the conversation (`raw_prompt`), and
    of the task `data_source`, `extra_info` and the ground truth (`reward_model.ground_truth`, else
    `ground_truth`, else `answer`). Of several model calls the last one counts. Numbers that the reward
    function returns beside `score` become components, everything else notes.

    Args:
        workers: handles of verl's `RewardLoopWorker` actors.
        version: see `Grader`.
        timeout: seconds that one reward may take.
    """

    def __init__(self, workers: Sequence[Any], version: str, timeout: float = 300.0) -> None:
        super().__init__(name=NAME, version=version, timeout=timeout, isolated=False)
        self._next = itertools.cycle(workers)

    async def grade(self, submission: Submission) -> Grade:
        """verl's reward of the attempt's last model call."""
        data = _verl_data(submission)
        try:
            result = await next(self._next).compute_score.remote(data)
        except Exception as error:  # whatever the user's function raises, wrapped by Ray
            cause = getattr(error, "cause", None) or error
            said = (str(cause).splitlines() or [""])[0]
            raise GraderFailed(
                f"verl's reward raised {type(cause).__name__}: {said}", outcome="raised", detail=str(error)
            ) from None
        return read_result(result)


def read_result(result: Mapping[str, Any]) -> Grade:
    """The verdict that a reward-loop worker's answer stands for."""
    extra = {str(key): _plain(value) for key, value in (result.get("reward_extra_info") or {}).items()}
    # verl notes a bare score as `acc`, and a mapping's score once more.
    extra = {key: value for key, value in extra.items() if key != "score"}
    components = {key: float(value) for key, value in extra.items() if isinstance(value, Real)}
    notes = {key: value for key, value in extra.items() if key not in components}
    return Grade(value=_plain(result["reward_score"]), components=components, notes=notes)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value


def _verl_data(submission: Submission) -> Any:
    """One attempt in verl's form."""
    import torch
    from verl import DataProto

    prompt, choice = _last_call(submission)
    tensors = {
        "prompts": torch.from_numpy(prompt.astype(np.int64))[None],
        "responses": torch.from_numpy(choice.token_ids.astype(np.int64))[None],
        "attention_mask": torch.ones((1, len(prompt) + len(choice.token_ids)), dtype=torch.int64),
    }
    task = submission.input if isinstance(submission.input, Mapping) else {"task": submission.input}
    truth = (task.get("reward_model") or {}).get("ground_truth", task.get("ground_truth", task.get("answer")))
    others = {
        "data_source": str(task.get("data_source", "")),
        "reward_model": {"ground_truth": truth},
        "extra_info": {**(task.get("extra_info") or {}), "rollout_id": submission.rollout_id},
        "raw_prompt": _asked(submission),
    }
    return DataProto.from_dict(
        tensors=tensors, non_tensors={name: _one(each) for name, each in others.items()}
    )


def _last_call(submission: Submission) -> tuple[Any, Choice]:
    for span in reversed(submission.spans):
        if span.model_call is not None and span.model_call.choices:
            return span.model_call.prompt_token_ids, span.model_call.choices[0]
    raise GraderFailed("no model call of this attempt was captured", outcome="no_model_call", final=True)


def _asked(submission: Submission) -> list[dict[str, Any]]:
    """The conversation before the answer; a prompt of which only tokens are known counts as the user's."""
    asked = submission.messages[:-1]
    return [{**each, "role": "user" if each.get("role") == "prompt" else each.get("role")} for each in asked]


def _one(value: Any) -> Any:
    """An array of one object, whatever that is."""
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


def await_verl(link: StoreLink, run_id: str, reward: Mapping[str, Any]) -> None:
    """Has the run wait for verl's rewards; graders that it waits for already stay."""
    link.run(_await_verl(link.client, run_id, reward))


async def _await_verl(client: StoreClient, run_id: str, reward: Mapping[str, Any]) -> None:
    run = await client.get_run_by_id(run_id)
    others = [each for each in run.graders if each.name != NAME] if run is not None else []
    await client.update_run(run_id, graders=[*others, RunGrader(NAME, version_of(reward))])


def start_grading(
    link: StoreLink,
    workers: Sequence[Any],
    reward: Mapping[str, Any],
    decode: Decode,
    failed: Callable[[str], None],
) -> Future[None]:
    """Grades what is sealed, beside the trainer, until the link is closed; `failed` hears of an early end."""
    grading = link.start(_grade(link.client, VerlGrader(workers, version_of(reward)), decode))

    def ended(future: Future[None]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            failed(f"verl's rewards ended: {type(error).__name__}: {error}")

    grading.add_done_callback(ended)
    return grading


async def _grade(operator: StoreClient, grader: VerlGrader, decode: Decode) -> None:
    credential = await operator.create_grader_credential(lifetime_seconds=_LIFETIME)
    async with StoreClient(operator.target, run_id=operator.run_id, credential=credential) as client:
        worker = GraderWorker(client, Graders((grader,)), decode=decode)
        try:
            await worker.run()
        finally:
            await worker.close()

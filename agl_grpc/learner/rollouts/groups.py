"""What passes between the source of rollouts and the trainer: groups asked for, groups that came back."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agl_grpc.model.rollout import seed_of
from agl_grpc.sample.facts import AttemptFacts

UNKNOWN_STEP = -2
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


def group_uid(run_name: str, place: int, index: int) -> str:
    """Id of the group that is asked for as the ``place``-th, from the dataset's ``index``-th task.

    Deterministic, and without an underscore: verl splits keys there.
    """
    return f"{run_name}.s{place}.i{index}"


def place_of(uid: str) -> int:
    """The place in the order of prompts that a group's id names."""
    return int(uid.rpartition(".s")[2].partition(".i")[0])


@dataclass(frozen=True)
class GroupRequest:
    """One task, to be tried ``size`` times; the tries are compared with each other.

    ``uid`` is what `group_uid` makes; ``step`` is the one in which it was asked for.
    """

    uid: str
    index: int
    task: Any
    size: int
    step: int
    validate: bool = False

    def rollout_id(self, number: int, again: int = 0) -> str:
        """Id of the group's ``number``-th rollout, from 0; ``again`` counts the tries before this one."""
        return f"{self.uid}.n{number}.r{again}" if again else f"{self.uid}.n{number}"

    def place_of(self, rollout_id: str) -> tuple[int, int]:
        """Number and try of a rollout of this group: the inverse of ``rollout_id``."""
        number, _, again = rollout_id.removeprefix(f"{self.uid}.n").partition(".r")
        return int(number), int(again or 0)

    def seed(self, base: int, rollout_id: str) -> int:
        """Sampling seed of one of its rollouts: the same in every run of that seed, whatever its name."""
        place = f"val/{self.step}/{self.index}" if self.validate else self.uid.rpartition(".s")[2]
        return seed_of(str(base), place, self.place_of(rollout_id)[0])


@dataclass(frozen=True)
class Row:
    """One token sequence of a rollout, ready to train.

    ``response_ids``, ``response_mask``, ``logprobs`` and ``policy_versions`` have one entry per response
    token; the mask is 1 where the token was sampled by the policy and is trained. Logprobs are natural
    logarithms and 0 where the mask is 0; policy versions are -1 there. A policy version is the optimiser step
    of the weights, `UNKNOWN_STEP` for weights that are none of this trainer's. ``turns`` are the row's
    answers: first token and one past the last, within the response, and the answer's return.
    """

    prompt_ids: IntArray
    response_ids: IntArray
    response_mask: IntArray
    logprobs: FloatArray
    policy_versions: IntArray
    temperature: float = 1.0
    turns: tuple[tuple[int, int, float], ...] = ()

    @property
    def oldest_step(self) -> int:
        """The oldest weights that sampled a trained token, by their optimiser step; negative = unknown."""
        return int(self.policy_versions[self.response_mask == 1].min(initial=np.iinfo(np.int64).max))


@dataclass(frozen=True)
class FinishedRollout:
    """A sealed rollout: its reward, its rows, and where its tokens went.

    ``reward`` is None when none was given; ``failure`` says why a rollout cannot be trained (empty = it can).
    ``captured``, ``observed`` and ``dropped`` count response-side tokens: captured = trained + observed +
    dropped. ``row_starts`` counts why its rows began; ``unplaced_rewards`` are rewards of steps or calls that
    are none of its trained answers. ``facts`` are for metrics.
    """

    rollout_id: str
    group_id: str
    reward: float | None
    rows: tuple[Row, ...]
    failure: str = ""
    attempt_id: str = ""
    captured: int = 0
    observed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    row_starts: dict[str, int] = field(default_factory=dict)
    unplaced_rewards: int = 0
    facts: AttemptFacts = field(default_factory=AttemptFacts)


@dataclass(frozen=True)
class FinishedGroup:
    """A group none of whose rollouts will change any more, in the order of their numbers."""

    request: GroupRequest
    rollouts: tuple[FinishedRollout, ...]


@dataclass(frozen=True)
class LeadersBatch:
    """The groups that the training run which is followed trains in a step, in their order."""

    step: int
    groups: tuple[str, ...]


@dataclass(frozen=True)
class BatchEntry:
    """What a claimed batch says of one rollout: the values that the optimiser must use."""

    rollout_id: str
    group_id: str
    reward: float


@dataclass(frozen=True)
class ClaimedBatch:
    """A batch frozen by the store: its id, its content hash and its entries."""

    batch_id: str
    content_hash: str
    entries: tuple[BatchEntry, ...]


class RolloutSource(Protocol):
    """Where rollouts come from. Calls are made by the trainer's thread; ``deliver`` may be called by any
    thread.
    """

    def submit(self, groups: list[GroupRequest]) -> None:
        """Asks for groups; each is delivered once, when all its rollouts are sealed."""

    def claim(self, step: int, rollout_ids: list[str]) -> ClaimedBatch:
        """Freezes the rollouts of a batch, in the order in which they are trained."""

    def describe(self, uids: list[str]) -> str:
        """One line on what the groups still wait for; for messages about deadlines."""


Arrival = FinishedGroup | LeadersBatch | BaseException
Deliver = Callable[[Arrival], None]


def seal(rollout_id: str, group_id: str, reward: float) -> str:
    """Digest over what must arrive together at the optimiser: a rollout, its group and its reward."""
    digest = hashlib.blake2b(digest_size=16)
    for text in (rollout_id, group_id):
        data = text.encode()
        digest.update(struct.pack("<I", len(data)) + data)
    digest.update(struct.pack("<f", reward))
    return digest.hexdigest()

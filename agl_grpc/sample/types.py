"""What the sample room hands on: samples, the token account, and their rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from agl_grpc.v1.reward_pb2 import Reward
from agl_grpc.v1.span_pb2 import StoredSpan

Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class SampleError(ValueError):
    """Stored data that cannot be right (lengths that differ, an identity that does not hold)."""


class DropReason(StrEnum):
    """Why captured tokens are not trained."""

    LATE = "late"
    OTHER_MODEL = "other_model"
    NOT_TRAIN_MODE = "not_train_mode"
    OTHER_AGENT = "other_agent"
    UNTRAINABLE = "untrainable"
    ORPHAN = "orphan"
    """The answer never reached the agent, whose client asked again."""
    NOT_COMPLETE = "not_complete"
    EMPTY_RESPONSE = "empty_response"
    LOGPROBS_UNKNOWN = "logprobs_unknown"
    POLICY_VERSION_UNKNOWN = "policy_version_unknown"
    UNSELECTED_SIBLING = "unselected_sibling"
    LENGTH = "length"
    NO_REWARD = "no_reward"
    CAPTURE_INCOMPLETE = "capture_incomplete"
    GROUP_TOO_SMALL = "group_too_small"
    MERGED_PREFIX = "merged_prefix"
    """Prompt tokens that repeat the row that the call was merged into: trained or masked there, once."""


class RowStart(StrEnum):
    """Why a row begins at its first call instead of going on with an earlier row."""

    FIRST = "first"
    BRANCH = "branch"
    """An earlier call's sequence is continued a second time."""
    BASE_UNTRAINABLE = "base_untrainable"
    """The call that it continues is left out."""
    SAMPLING_CHANGED = "sampling_changed"
    """The call that it continues was sampled at another temperature."""
    RESPONSE_CHANGED = "response_changed"
    """An earlier prompt is kept, its response came back with other tokens (retokenised, stripped)."""
    PROMPT_CHANGED = "prompt_changed"
    """No earlier prompt is kept whole: another conversation, a summary, a rewritten history."""


@dataclass(frozen=True, slots=True)
class SampleRules:
    """What is trained (decision T9) and how.

    model: served name of the trained model; empty = every model.
    agents: names of the agents (parts of them) that are trained; empty = all.
    train_truncated: train answers cut by the length limit; default: they stay in their row with
        mask 0, so that their reward counts in the group, and are accounted as `length`.
    reward_name: the reward that counts.
    minimum_group: groups with fewer trained rollouts than this are dropped (`prune_groups`).
    """

    model: str = ""
    agents: frozenset[str] = frozenset()
    train_truncated: bool = False
    reward_name: str = "primary"
    minimum_group: int = 2


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A sealed attempt as read from the store (`ListSpans` with whole prompts, `ListRewards`)."""

    rollout_id: str
    attempt_id: str
    group_id: str
    spans: Sequence[StoredSpan]
    rewards: Sequence[Reward]
    capture_incomplete: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of training: a conversation's tokens from one prompt on.

    prompt_ids int32[P]: tokens before the first sampled one.
    response_ids int32[R]: sampled tokens and what was observed between them.
    response_mask int8[R]: 1 = sampled and trained, 0 = observation (or left out of the loss).
    logprobs float32[R]: sampling logprobs in nats; 0 where the mask is 0.
    policy_versions int64[R]: optimiser step whose weights sampled the token; -1 where the mask is 0.
    reward: the rollout's reward. temperature: of all calls of the row.
    span_ids: the model calls that the row is made of, in order. start: why the row begins here.
    """

    rollout_id: str
    attempt_id: str
    group_id: str
    prompt_ids: Int32Array
    response_ids: Int32Array
    response_mask: Int8Array
    logprobs: Float32Array
    policy_versions: Int64Array
    reward: float
    temperature: float = 1.0
    span_ids: tuple[bytes, ...] = ()
    start: RowStart = RowStart.FIRST

    @property
    def trained_tokens(self) -> int:
        """Number of tokens with mask 1."""
        return int(self.response_mask.sum())

    @property
    def length(self) -> int:
        """Prompt and response together, in tokens."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(slots=True)
class TokenAccount:
    """Where captured tokens went: captured = trained + observation + sum(dropped).

    Each sampled answer counts its prompt and its response (a call with n answers counts its prompt n
    times: each answer is a sequence of its own); a call without an answer counts its prompt once.
    """

    captured: int = 0
    trained: int = 0
    observation: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: TokenAccount) -> None:
        """Add another account to this one."""
        self.captured += other.captured
        self.trained += other.trained
        self.observation += other.observation
        self.dropped.update(other.dropped)

    def check(self) -> None:
        """Raise SampleError unless every captured token has exactly one fate."""
        total = self.trained + self.observation + self.dropped.total()
        if total != self.captured:
            raise SampleError(
                f"token account does not balance: captured {self.captured}, accounted {total} (trained "
                f"{self.trained}, observation {self.observation}, dropped {dict(self.dropped)})"
            )


@dataclass(slots=True)
class AttemptSamples:
    """The rows of one attempt, or of many when added up by `prune_groups`.

    row_starts counts why rows began; reward is None where the attempt has none (no rows then).
    """

    rollout_id: str
    attempt_id: str
    group_id: str
    reward: float | None
    rows: list[Sample]
    account: TokenAccount
    row_starts: Counter[str] = field(default_factory=Counter)

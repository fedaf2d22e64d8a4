"""What the sample room hands on: samples, the token account, and their rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_grpc.v1.reward_pb2 import Reward
from agl_grpc.v1.span_pb2 import StoredSpan

if TYPE_CHECKING:
    from agl_grpc.sample.calls import CallSpan
    from agl_grpc.sample.facts import AttemptFacts

Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class SampleError(ValueError):
    """Stored data that cannot be right (lengths that differ, an identity that does not hold)."""


class DropReason(StrEnum):
    """Why captured tokens are not trained; `sentence` says it to people."""

    sentence: str

    def __new__(cls, value: str, sentence: str = "") -> DropReason:
        """A reason with its sentence."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member

    LATE = "late", "the call began after its attempt had ended, or came after sealing"
    OTHER_MODEL = "other_model", "the call is of another model than the one that is trained"
    NOT_TRAIN_MODE = (
        "not_train_mode",
        "the call was not sampled in train mode (validation, grading, no-train)",
    )
    OTHER_AGENT = "other_agent", "the agent that called is none of those that are trained"
    UNTRAINABLE = "untrainable", "the engine's side marked the call as not trainable"
    ORPHAN = "orphan", "the answer never reached the agent, whose client asked again"
    NOT_COMPLETE = "not_complete", "the answer was cut off or the engine failed"
    EMPTY_RESPONSE = "empty_response", "no token was sampled"
    LOGPROBS_UNKNOWN = "logprobs_unknown", "the logprobs are not those of the sampled distribution"
    POLICY_VERSION_UNKNOWN = "policy_version_unknown", "it is not known which weights sampled the tokens"
    UNSELECTED_SIBLING = "unselected_sibling", "of several answers to one prompt others were used"
    LENGTH = "length", "the answer was cut off by the length limit"
    OVER_LONG = "over_long", "the row would be longer than the rules allow"
    NO_REWARD = "no_reward", "the attempt has none of the rewards that count"
    GRADER_FAILED = "grader_failed", "a grader failed to give a reward that counts"
    REWARD_NOT_FINITE = "reward_not_finite", "the attempt's reward is NaN or infinite"
    CAPTURE_INCOMPLETE = "capture_incomplete", "the attempt was sealed while a model call was open"
    GROUP_TOO_SMALL = "group_too_small", "too few rollouts of the group can be trained"
    MERGED_PREFIX = "merged_prefix", "the tokens repeat those of an earlier turn: they count there, once"
    NOT_CLAIMED = "not_claimed", "no batch contains the attempt"
    NOT_SEALED = "not_sealed", "the attempt is not finished: calls or rewards may still come"


class RowStart(StrEnum):
    """Why a row begins at its first call instead of going on with an earlier row."""

    FIRST = "first"
    BRANCH = "branch"
    """An earlier call's sequence is continued a second time."""
    CUT = "cut"
    """The call that it continues was cut off (disconnect, deadline, abort)."""
    BASE_UNTRAINABLE = "base_untrainable"
    """The call that it continues is left out for another reason."""
    SAMPLING_CHANGED = "sampling_changed"
    """The call that it continues was sampled at another temperature."""
    TRUNCATION = "truncation"
    """The earlier response ran into the length limit and came back otherwise."""
    RETOKENISED = "retokenised"
    """The earlier response came back as the same text in other tokens."""
    TOOL_CALL_RESERIALISED = "tool_call_reserialised"
    """The earlier response came back with the same tool call written otherwise (key order, spaces)."""
    TEMPLATE = "template"
    """The chat template renders the earlier response otherwise in a history (thinking stripped, spaces)."""
    RESPONSE_CHANGED = "response_changed"
    """An earlier prompt is kept, its response came back with other tokens, it is not known why."""
    PROMPT_CHANGED = "prompt_changed"
    """No earlier prompt is kept whole: another conversation, a summary, a rewritten history."""


class Truncated(StrEnum):
    """What becomes of answers that the length limit cut off."""

    MASK = "mask"
    """They stay in their row with mask 0: the rollout's reward counts in its group, they are not trained."""
    TRAIN = "train"
    DROP = "drop"
    """The whole attempt is left out."""


class OverLong(StrEnum):
    """What becomes of rows that are longer than the rules allow."""

    DROP = "drop"
    """The row is left out; other rows of its attempt stay."""
    CUT = "cut"
    """The row ends with the last whole answer that fits. Never is its beginning cut off."""


@dataclass(frozen=True, slots=True)
class SampleRules:
    """What is trained (decision T9) and how.

    model: served name of the trained model; empty = every model.
    agents: names of the agents (parts of them) that are trained; empty = all.
    truncated: answers cut off by the length limit; masked ones are accounted as `length`.
    reward_name: the reward that counts.
    reward_weights: (name, weight) of several rewards that count as their weighted sum, in place of
        reward_name; an attempt that lacks one of them has no reward.
    minimum_group: groups with fewer trained rollouts than this are dropped (`prune_groups`).
    max_row_tokens: most tokens of a row, prompt and response; 0 = no limit.
    over_long: longer rows.
    discount: factor by which a reward counts less for each answer between it and an earlier one (0 to 1).
    """

    model: str = ""
    agents: frozenset[str] = frozenset()
    truncated: Truncated = Truncated.MASK
    reward_name: str = "primary"
    minimum_group: int = 2
    reward_weights: tuple[tuple[str, float], ...] = ()
    max_row_tokens: int = 0
    over_long: OverLong = OverLong.DROP
    discount: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"discount {self.discount} must be from 0 to 1")
        if self.max_row_tokens < 0:
            raise ValueError(f"max_row_tokens {self.max_row_tokens} must not be negative (0 = no limit)")
        for name, weight in self.reward_weights:
            if not name or not math.isfinite(weight):
                raise ValueError(f"reward weight {name!r}={weight} needs a name and a finite weight")

    @property
    def counted_rewards(self) -> dict[str, float]:
        """Names of the rewards that count, with their weights."""
        return dict(self.reward_weights) or {self.reward_name: 1.0}


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A sealed attempt as read from the store (`ExportSpans`, `ListRewards`).

    spans: its spans; prompts may be whole or differences to others of them.
    """

    rollout_id: str
    attempt_id: str
    group_id: str
    spans: Sequence[StoredSpan | CallSpan]
    rewards: Sequence[Reward]
    capture_incomplete: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """A sampled answer of a row.

    start and end are places in the row's response. reward is the answer's own (0 = none), its rewards by step
    and by span, weighted. ret is its return: its own reward, and discounted all later ones of its attempt and
    the attempt's own.
    """

    span_id: bytes
    choice: int
    start: int
    end: int
    reward: float = 0.0
    ret: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of training: a conversation's tokens from one prompt on.

    prompt_ids int32[P]: tokens before the first sampled one.
    response_ids int32[R]: sampled tokens and what was observed between them.
    response_mask int8[R]: 1 = sampled and trained, 0 = observation (or left out of the loss).
    logprobs float32[R]: sampling logprobs in nats; 0 where the mask is 0.
    policy_versions int64[R]: optimiser step whose weights sampled the token; -1 where the mask is 0.
    reward: the rollout's reward. temperature: of all calls of the row.
    turns: the sampled answers that the row is made of, in order. start: why the row begins here.
    rewards: all rewards of the whole attempt by name, those that do not count too.
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
    turns: tuple[Turn, ...] = ()
    start: RowStart = RowStart.FIRST
    rewards: Mapping[str, float] = field(default_factory=dict)

    @property
    def span_ids(self) -> tuple[bytes, ...]:
        """The model calls that the row is made of, in order."""
        return tuple(turn.span_id for turn in self.turns)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens with mask 1."""
        return int(np.count_nonzero(self.response_mask))

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
    """The rows of one attempt.

    row_starts counts why rows began; reward is None where the attempt has none (no rows then).
    unplaced_rewards: rewards of steps or spans that are none of the trained answers: they count nowhere.
    facts: what else is known of it, where somebody asked (`observe`).
    """

    rollout_id: str
    attempt_id: str
    group_id: str
    reward: float | None
    rows: list[Sample]
    account: TokenAccount
    row_starts: Counter[str] = field(default_factory=Counter)
    unplaced_rewards: int = 0
    facts: AttemptFacts | None = None

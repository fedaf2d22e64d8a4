"""Rules, accounts and samples in the contract's form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agl_grpc.model import raw
from agl_grpc.sample.types import (
    Float32Array,
    Int8Array,
    Int32Array,
    OverLong,
    RowStart,
    Sample,
    SampleError,
    SampleRules,
    TokenAccount,
    Truncated,
    Turn,
)
from agl_grpc.v1 import batch_pb2, common_pb2

Float64Array = npt.NDArray[np.float64]
UInt32Array = npt.NDArray[np.uint32]

_TRUNCATED = {
    Truncated.MASK: batch_pb2.TRUNCATED_POLICY_MASK,
    Truncated.TRAIN: batch_pb2.TRUNCATED_POLICY_TRAIN,
    Truncated.DROP: batch_pb2.TRUNCATED_POLICY_DROP,
}
_OVER_LONG = {
    OverLong.DROP: batch_pb2.OVER_LONG_POLICY_DROP,
    OverLong.CUT: batch_pb2.OVER_LONG_POLICY_CUT,
}


def rules_to_proto(rules: SampleRules) -> batch_pb2.SampleRules:
    """The rules as a batch freezes them; what has its default is left unset.

    `minimum_group` is none of them: it says which attempts a batch is made of.
    """
    default = SampleRules()
    message = batch_pb2.SampleRules(
        model=rules.model, agents=sorted(rules.agents), max_row_tokens=rules.max_row_tokens
    )
    if rules.reward_name != default.reward_name:
        message.reward_name = rules.reward_name
    for name, weight in rules.reward_weights:
        message.reward_weights.add(name=name, weight=weight)
    if rules.truncated is not default.truncated:
        message.truncated = _TRUNCATED[rules.truncated]
    if rules.over_long is not default.over_long:
        message.over_long = _OVER_LONG[rules.over_long]
    if rules.discount != default.discount:
        message.discount = rules.discount
    return message


def rules_from_proto(message: batch_pb2.SampleRules) -> SampleRules:
    """The rules that a batch was made by. Raises ValueError for rules that cannot be."""
    truncated = {number: policy for policy, number in _TRUNCATED.items()}
    over_long = {number: policy for policy, number in _OVER_LONG.items()}
    return SampleRules(
        model=message.model,
        agents=frozenset(message.agents),
        truncated=truncated.get(message.truncated, Truncated.MASK),
        reward_name=message.reward_name or SampleRules().reward_name,
        reward_weights=tuple((item.name, item.weight) for item in message.reward_weights),
        max_row_tokens=message.max_row_tokens,
        over_long=over_long.get(message.over_long, OverLong.DROP),
        discount=message.discount if message.HasField("discount") else 1.0,
    )


def account_to_proto(account: TokenAccount) -> batch_pb2.TokenAccount:
    """The account, reasons in alphabetical order."""
    return batch_pb2.TokenAccount(
        captured=account.captured,
        trained=account.trained,
        observation=account.observation,
        dropped=[
            common_pb2.KeyValue(key=reason, value=common_pb2.AnyValue(int_value=count))
            for reason, count in sorted(account.dropped.items())
        ],
    )


def account_from_proto(message: batch_pb2.TokenAccount) -> TokenAccount:
    """The account."""
    account = TokenAccount(message.captured, message.trained, message.observation)
    for item in message.dropped:
        account.dropped[item.key] = item.value.int_value
    return account


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows as packed arrays, as `StreamBatch` sends them; see `SampleColumns` of the contract.

    row_offsets uint32[N+1]; input_ids int32, loss_mask int8, logprobs float32, policy_versions int32: one
    entry a token, prompts included; prompt_lengths uint32[N]; rewards and temperatures float64[N].
    """

    row_offsets: UInt32Array
    prompt_lengths: UInt32Array
    input_ids: Int32Array
    loss_mask: Int8Array
    logprobs: Float32Array
    policy_versions: Int32Array
    rewards: Float64Array
    temperatures: Float64Array
    message: Any

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.prompt_lengths)


def pack(samples: Sequence[Sample]) -> Any:
    """Samples as a RawSampleColumns message."""
    lengths = np.fromiter((s.length for s in samples), np.int64, len(samples))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    prompts = np.fromiter((len(s.prompt_ids) for s in samples), np.int64, len(samples))
    # Where in the columns tokens of responses are; those of prompts keep the columns' defaults.
    sampled = np.repeat(offsets[:-1] + prompts, lengths - prompts)
    sampled += np.arange(len(sampled)) - np.repeat(
        np.cumsum(lengths - prompts) - (lengths - prompts), lengths - prompts
    )
    message = raw.RawSampleColumns(
        row_offsets=offsets.astype("<u4").tobytes(),
        prompt_lengths=prompts.astype("<u4").tobytes(),
        input_ids=_joined([a for s in samples for a in (s.prompt_ids, s.response_ids)], "<i4"),
        loss_mask=_spread([s.response_mask for s in samples], sampled, total, "<i1", 0),
        logprobs=_spread([s.logprobs for s in samples], sampled, total, "<f4", 0),
        policy_versions=_spread([s.policy_versions for s in samples], sampled, total, "<i4", -1),
        rewards=np.array([s.reward for s in samples], "<f8").tobytes(),
        temperatures=np.array([s.temperature for s in samples], "<f8").tobytes(),
        rollout_ids=[s.rollout_id for s in samples],
        group_ids=[s.group_id for s in samples],
        attempt_ids=[s.attempt_id for s in samples],
        row_starts=[s.start.value for s in samples],
    )
    _pack_turns(message, samples, prompts)
    _pack_rewards(message, samples)
    return message


def _joined(arrays: Sequence[npt.NDArray[Any]], form: str) -> bytes:
    return np.concatenate(arrays).astype(form, copy=False).tobytes() if arrays else b""


def _spread(
    arrays: Sequence[npt.NDArray[Any]], places: npt.NDArray[np.int64], total: int, form: str, default: int
) -> bytes:
    column = np.full(total, default, form)
    if arrays:
        column[places] = np.concatenate(arrays)
    return column.tobytes()


def _pack_turns(message: Any, samples: Sequence[Sample], prompts: npt.NDArray[np.int64]) -> None:
    turns = [turn for sample in samples for turn in sample.turns]
    counts = [len(sample.turns) for sample in samples]
    before = np.repeat(prompts, counts)
    message.turn_offsets = np.cumsum([0, *counts]).astype("<u4").tobytes()
    message.turn_span_ids = b"".join([turn.span_id for turn in turns])
    message.turn_choices = np.array([turn.choice for turn in turns], "<u4").tobytes()
    message.turn_starts = (np.array([turn.start for turn in turns], "<u4") + before).astype("<u4").tobytes()
    message.turn_ends = (np.array([turn.end for turn in turns], "<u4") + before).astype("<u4").tobytes()
    message.turn_rewards = np.array([turn.reward for turn in turns], "<f8").tobytes()
    message.turn_returns = np.array([turn.ret for turn in turns], "<f8").tobytes()


def _pack_rewards(message: Any, samples: Sequence[Sample]) -> None:
    names = sorted({name for sample in samples for name in sample.rewards})
    values = [sample.rewards.get(name, np.nan) for sample in samples for name in names]
    message.reward_names.extend(names)
    message.reward_values = np.array(values, "<f8").tobytes()


def read_columns(message: Any) -> Columns:
    """A RawSampleColumns (or SampleColumns) as arrays without a copy, read-only.

    Raises SampleError when columns do not fit together.
    """
    if isinstance(message, batch_pb2.SampleColumns):
        message = raw.RawSampleColumns.FromString(message.SerializeToString())
    columns = Columns(
        np.frombuffer(message.row_offsets, "<u4"),
        np.frombuffer(message.prompt_lengths, "<u4"),
        np.frombuffer(message.input_ids, "<i4"),
        np.frombuffer(message.loss_mask, "<i1"),
        np.frombuffer(message.logprobs, "<f4"),
        np.frombuffer(message.policy_versions, "<i4"),
        np.frombuffer(message.rewards, "<f8"),
        np.frombuffer(message.temperatures, "<f8"),
        message,
    )
    arrays = (columns.input_ids, columns.loss_mask, columns.logprobs, columns.policy_versions)
    rows = columns.rows
    total = int(columns.row_offsets[-1]) if len(columns.row_offsets) else 0
    if {len(array) for array in arrays} != {total} or len(columns.row_offsets) not in (rows + 1, 0):
        raise SampleError(
            f"columns of {rows} rows and {total} tokens have {[len(array) for array in arrays]} entries"
        )
    return columns


def unpack(columns: Columns) -> Iterator[Sample]:
    """The rows of packed columns, as views of them."""
    message, offsets = columns.message, columns.row_offsets.tolist()
    turn_offsets = np.frombuffer(message.turn_offsets, "<u4").tolist()
    turns = _unpack_turns(message)
    names = list(message.reward_names)
    values = np.frombuffer(message.reward_values, "<f8").reshape(-1, len(names)) if names else None
    for i, prompt_length in enumerate(columns.prompt_lengths.tolist()):
        start, end = offsets[i], offsets[i + 1]
        response = slice(start + prompt_length, end)
        own = turns[turn_offsets[i] : turn_offsets[i + 1]]
        named = {} if values is None else dict(zip(names, values[i].tolist(), strict=True))
        yield Sample(
            message.rollout_ids[i],
            message.attempt_ids[i],
            message.group_ids[i],
            columns.input_ids[start : start + prompt_length],
            columns.input_ids[response],
            columns.loss_mask[response],
            columns.logprobs[response],
            columns.policy_versions[response].astype(np.int64),
            float(columns.rewards[i]),
            float(columns.temperatures[i]),
            tuple(
                Turn(span_id, choice, first - prompt_length, last - prompt_length, reward, ret)
                for span_id, choice, first, last, reward, ret in own
            ),
            RowStart(message.row_starts[i]),
            {name: value for name, value in named.items() if not np.isnan(value)},
        )


def _unpack_turns(message: Any) -> list[tuple[bytes, int, int, int, float, float]]:
    ids = message.turn_span_ids
    columns = [
        np.frombuffer(data, form).tolist()
        for data, form in (
            (message.turn_choices, "<u4"),
            (message.turn_starts, "<u4"),
            (message.turn_ends, "<u4"),
            (message.turn_rewards, "<f8"),
            (message.turn_returns, "<f8"),
        )
    ]
    return [(ids[8 * i : 8 * i + 8], *values) for i, values in enumerate(zip(*columns, strict=True))]

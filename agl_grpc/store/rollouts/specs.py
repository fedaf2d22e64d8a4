"""What a caller says of a rollout, checked and turned into columns. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from agl_grpc.store.clock import SECOND
from agl_grpc.store.errors import invalid_field
from agl_grpc.store.ids import mint
from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.encode import duration_of, set_duration, set_time, time_of
from agl_grpc.store.rollouts.rows import RolloutRow
from agl_grpc.store.storage.catalog import require_id
from agl_grpc.v1 import rollout_pb2

DEFAULT_ATTEMPTS = 1
DEFAULT_REDELIVERIES = 3
DEFAULT_BACKOFF = 1 * SECOND


@dataclass(slots=True)
class Plan:
    """A rollout about to be inserted; times in microseconds."""

    key: int
    message: rollout_pb2.Rollout
    rules: lifecycle.Rules
    timeout: int | None
    unresponsive: int | None
    ready_time: int
    expire_time: int | None
    queue_key: int = 0
    group_key: int | None = None
    label_set_key: int = 0
    resource_key: int | None = None
    queued: bool = True

    def due(self, now: int) -> int | None:
        """When a timer has to look at it while it waits in its queue."""
        moments = [self.expire_time, self.ready_time if self.ready_time > now else None]
        return min((moment for moment in moments if moment is not None), default=None)

    def columns(self, run_key: int, now: int, waits: bool) -> tuple[object, ...]:
        """The row to insert; `waits` = it goes into its queue."""
        message, rules = self.message, self.rules
        return (
            *(self.key, message.rollout_id, run_key, self.queue_key, self.group_key, self.label_set_key),
            *(message.priority, message.mode, lifecycle.QUEUING, int(waits and self.ready_time <= now)),
            *(self.ready_time, self.due(now) if waits else None, now, self.expire_time, self.timeout),
            *(self.unresponsive, rules.max_attempts, rules.retry_mask, rules.max_redeliveries),
            *(rules.backoff, message.binding, self.resource_key),
        )

    def row(self, run_key: int) -> RolloutRow:
        """The row as it is read back."""
        rules = self.rules
        return RolloutRow(
            key=self.key,
            rollout_id=self.message.rollout_id,
            run_key=run_key,
            queue_key=self.queue_key,
            label_set_key=self.label_set_key,
            status=lifecycle.QUEUING,
            sealed=0,
            ready=0,
            ready_time=self.ready_time,
            due=None,
            expire_time=self.expire_time,
            timeout=self.timeout,
            unresponsive=self.unresponsive,
            max_attempts=rules.max_attempts,
            retry_mask=rules.retry_mask,
            max_redeliveries=rules.max_redeliveries,
            backoff=rules.backoff,
            ended_attempts=0,
            redeliveries=0,
            attempt_count=0,
            latest_attempt_key=None,
            resource_key=self.resource_key,
        )


def plan_of(spec: rollout_pb2.RolloutSpec, path: str, key: int, run_id: str, now: int) -> Plan:
    """A checked plan; queue, group, labels and resources are still to be looked up.

    Args:
        spec: What the caller says.
        path: Where it stands in the request, for messages.
        key: The rollout's integer key.
        run_id: The run.
        now: Microseconds since the epoch.

    Raises:
        StoreError: INVALID_FIELD.
    """
    message = rollout_pb2.Rollout(
        rollout_id=require_id(spec.rollout_id, f"{path}.rollout_id") if spec.rollout_id else mint("ro"),
        run_id=run_id,
        mode=spec.mode,
        group_id=spec.group_id,
        priority=spec.priority,
        binding=spec.binding or rollout_pb2.RESOURCE_BINDING_AT_ENQUEUE,
        labels=spec.labels,
        metadata=spec.metadata,
    )
    if spec.HasField("input"):
        message.input.CopyFrom(spec.input)
    set_time(message.create_time, now)
    ready_time, expire_time = now, None
    if spec.HasField("not_before"):
        message.not_before.CopyFrom(spec.not_before)
        ready_time = max(now, time_of(spec.not_before))
    if spec.HasField("expire_after"):
        message.expire_after.CopyFrom(spec.expire_after)
        expire_time = now + duration_of(spec.expire_after)
    config = message.config
    config.CopyFrom(spec.config)
    rules = rules_of(config, f"{path}.config")
    timeout = duration_of(config.timeout) if config.HasField("timeout") else None
    silence = None
    if config.HasField("unresponsive"):
        silence = duration_of(config.unresponsive)
    return Plan(key, message, rules, timeout, silence, ready_time, expire_time)


def rules_of(config: rollout_pb2.RolloutConfig, path: str) -> lifecycle.Rules:
    """Checked rules; defaults are written into `config`.

    Raises:
        StoreError: INVALID_FIELD.
    """
    config.max_attempts = config.max_attempts or DEFAULT_ATTEMPTS
    if not config.HasField("max_redeliveries"):
        config.max_redeliveries = DEFAULT_REDELIVERIES
    if not config.HasField("retry_backoff"):
        set_duration(config.retry_backoff, DEFAULT_BACKOFF)
    first = duration_of(config.retry_backoff)
    mask = 0
    for status in config.retry_condition:
        if status not in lifecycle.RETRYABLE:
            raise invalid_field(f"{path}.retry_condition", "may name FAILED, TIMEOUT and UNRESPONSIVE only")
        mask |= lifecycle.retry_bit(status)
    return lifecycle.Rules(config.max_attempts, mask, config.max_redeliveries, first, 0, 0)

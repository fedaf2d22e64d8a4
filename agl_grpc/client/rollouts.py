"""Rollouts: starting, queueing, taking, finding, changing, waiting and watching."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from agl_grpc.client.blobs import BlobCalls
from agl_grpc.client.errors import NotFound
from agl_grpc.client.filters import excludes_everything, rollout_filter
from agl_grpc.client.watch import Watched, watch
from agl_grpc.model.enums import FilterLogic, RolloutMode, RolloutStatus, SortOrder, WaitUntil
from agl_grpc.model.page import PaginatedResult
from agl_grpc.model.rollout import (
    AttemptedRollout,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
    rollout_from_proto,
)
from agl_grpc.model.times import to_duration
from agl_grpc.model.unset import UNSET, Unset
from agl_grpc.model.value import to_key_values, to_labels, to_payload
from agl_grpc.v1 import rollout_pb2
from agl_grpc.v1 import store_service_pb2 as pb

_LONG_POLL_SECONDS = 45.0
_WAIT_IDS = 10_000


class RolloutCalls(BlobCalls):
    """The client's methods for rollouts."""

    async def start_rollout(
        self,
        input: Any,
        mode: RolloutMode | str | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
        *,
        rollout_id: str | None = None,
        group_id: str | None = None,
        run_id: str | None = None,
    ) -> AttemptedRollout:
        """Make a rollout and its first attempt at once, without a queue and without a lease."""
        spec = EnqueueRolloutRequest(
            input=input,
            mode=mode,
            resources_id=resources_id,
            config=config,
            metadata=metadata,
            rollout_id=rollout_id,
            group_id=group_id,
        )
        request = pb.StartRolloutRequest(
            run_id=self.run_or_default(run_id), rollout=spec.to_proto(), worker_id=worker_id or ""
        )
        await self.spill([request.rollout.input])
        response = await self.call(self.bound.store.StartRollout, request)
        made = AttemptedRollout.from_messages(response.rollout, response.attempt_credential)
        return await self.with_input(made)

    async def enqueue_rollout(
        self,
        input: Any,
        mode: RolloutMode | str | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        *,
        rollout_id: str | None = None,
        group_id: str | None = None,
        queue: str | None = None,
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> Rollout:
        """Put a rollout into its queue; see `EnqueueRolloutRequest` for the fields."""
        spec = EnqueueRolloutRequest(
            input=input,
            mode=mode,
            resources_id=resources_id,
            config=config,
            metadata=metadata,
            rollout_id=rollout_id,
            group_id=group_id,
            queue=queue,
            priority=priority,
            labels=dict(labels or {}),
        )
        return (await self.enqueue_many_rollouts([spec], run_id=run_id))[0]

    async def enqueue_many_rollouts(
        self, rollouts: Sequence[EnqueueRolloutRequest], *, run_id: str | None = None
    ) -> Sequence[Rollout]:
        """Put rollouts into their queues, all or none; answers in the order given."""
        request = pb.EnqueueRolloutsRequest(
            run_id=self.run_or_default(run_id), rollouts=[rollout.to_proto() for rollout in rollouts]
        )
        await self.spill(rollout.input for rollout in request.rollouts)
        response = await self.call(self.bound.store.EnqueueRollouts, request)
        for made, asked in zip(response.rollouts, request.rollouts, strict=True):
            # Large answers come without what this side has anyway.
            if asked.HasField("input") and not made.HasField("input"):
                made.input.CopyFrom(asked.input)
                made.metadata.extend(asked.metadata)
        return [Rollout.from_proto(rollout) for rollout in response.rollouts]

    async def dequeue_rollout(
        self, worker_id: str | None = None, *, queues: Sequence[str] = (), run_id: str | None = None
    ) -> AttemptedRollout | None:
        """Take one waiting rollout without a lease; ``None`` when none waits."""
        taken = await self.dequeue_many_rollouts(limit=1, worker_id=worker_id, queues=queues, run_id=run_id)
        return taken[0] if taken else None

    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        queues: Sequence[str] = (),
        run_id: str | None = None,
    ) -> Sequence[AttemptedRollout]:
        """Take waiting rollouts without leases: timeout and unresponsive alone govern their attempts."""
        if limit <= 0:
            return []
        request = pb.DequeueRolloutsRequest(
            run_id=self.run_or_default(run_id), queues=queues, limit=limit, worker_id=worker_id or ""
        )
        response = await self.call(self.bound.store.DequeueRollouts, request)
        taken = [
            AttemptedRollout.from_messages(one.rollout, one.attempt_credential) for one in response.rollouts
        ]
        return await asyncio.gather(*(self.with_input(rollout) for rollout in taken))

    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        """Make a further attempt at a rollout, without a lease."""
        request = pb.StartAttemptRequest(rollout_id=rollout_id, worker_id=worker_id or "")
        response = await self.call(self.bound.store.StartAttempt, request)
        made = AttemptedRollout.from_messages(response.rollout, response.attempt_credential)
        return await self.with_input(made)

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        """One rollout, with its newest attempt when it has one; ``None`` when unknown."""
        try:
            request = pb.GetRolloutRequest(rollout_id=rollout_id)
            response = await self.call(self.bound.store.GetRollout, request)
        except NotFound:
            return None
        return await self.with_input(rollout_from_proto(response.rollout))

    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus | str] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: FilterLogic | str = FilterLogic.AND,
        sort_by: str | None = None,
        sort_order: SortOrder | str = SortOrder.ASCENDING,
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus | str] | None = None,
        rollout_ids: Sequence[str] | None = None,
        filter: rollout_pb2.RolloutFilter | None = None,
        run_id: str | None = None,
    ) -> PaginatedResult[Rollout]:
        """Rollouts by condition, with their newest attempts; an empty list of allowed values matches nothing.

        ``status`` and ``rollout_ids`` are older names of ``status_in`` and ``rollout_id_in``. ``filter``
        (see `rollout_filter`) takes the place of all conditions and knows more. ``limit`` -1 reads all pages.
        """
        status_in = status if status_in is None else status_in
        rollout_id_in = rollout_ids if rollout_id_in is None else rollout_id_in
        others = bool(rollout_id_contains)
        if filter is None and excludes_everything(
            status_in, rollout_id_in, logic=filter_logic, others=others
        ):
            return PaginatedResult(items=[], limit=limit, offset=offset, total=0)
        request = pb.ListRolloutsRequest(
            filter=filter
            or rollout_filter(
                run_id=self.run_or_default(run_id),
                status_in=status_in,
                rollout_id_in=rollout_id_in,
                rollout_id_contains=rollout_id_contains,
                logic=filter_logic,
            ),
            order_by=sort_by or "",
            order=SortOrder(sort_order).number,
            include_attempts=True,
        )
        return await self.query(
            self.bound.store.ListRollouts,
            request,
            lambda page: map(rollout_from_proto, page.rollouts),
            limit=limit,
            offset=offset,
        )

    async def update_rollout(
        self,
        rollout_id: str,
        input: Any | Unset = UNSET,
        mode: RolloutMode | str | Unset | None = UNSET,
        resources_id: str | Unset | None = UNSET,
        status: RolloutStatus | str | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: dict[str, Any] | Unset | None = UNSET,
        *,
        labels: Mapping[str, str] | Unset = UNSET,
        priority: int | Unset = UNSET,
    ) -> Rollout:
        """Change what is given, nothing else; ``None`` clears. Terminal states stay: `IllegalTransition`."""
        rollout = rollout_pb2.Rollout(rollout_id=rollout_id)
        request = pb.UpdateRolloutRequest(rollout=rollout)
        changes: dict[str, Any] = {
            "input": UNSET if isinstance(input, Unset) else input is not None and to_payload(input),
            "mode": UNSET if isinstance(mode, Unset) else mode and RolloutMode.parse(mode).number,
            "resources_id": resources_id,
            "status": UNSET if isinstance(status, Unset) else RolloutStatus.parse(status).number,
            "config": UNSET if isinstance(config, Unset) else config.to_proto(),
            "metadata": UNSET if isinstance(metadata, Unset) else to_key_values(metadata, "metadata"),
            "labels": UNSET if isinstance(labels, Unset) else to_labels(labels),
            "priority": priority,
        }
        given = {name: value for name, value in changes.items() if value is not UNSET}
        values = {name: value for name, value in given.items() if value}
        request.rollout.MergeFrom(rollout_pb2.Rollout(**values))
        request.update_mask.paths.extend(given)
        await self.spill([request.rollout.input])
        response = await self.call(self.bound.store.UpdateRollout, request)
        return Rollout.from_proto(response.rollout)

    async def cancel_rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        filter: rollout_pb2.RolloutFilter | None = None,
        reason: str = "",
    ) -> list[str]:
        """Cancel unfinished rollouts by ids or filter; running agents are told at once. Answers their ids."""
        request = pb.CancelRolloutsRequest(filter=self._chosen(rollout_ids, filter), reason=reason)
        return list((await self.call(self.bound.store.CancelRollouts, request)).rollout_ids)

    async def retry_rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        filter: rollout_pb2.RolloutFilter | None = None,
        expire_after: float | None = None,
    ) -> list[Rollout]:
        """Make a new rollout, with ``retry_of``, for each chosen finished one.

        ``expire_after`` (seconds) is how long they may wait in their queues; ``None`` = as the old ones.
        """
        request = pb.RetryRolloutsRequest(
            filter=self._chosen(rollout_ids, filter), expire_after=to_duration(expire_after)
        )
        response = await self.call(self.bound.store.RetryRollouts, request)
        return [Rollout.from_proto(rollout) for rollout in response.rollouts]

    async def delete_rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        filter: rollout_pb2.RolloutFilter | None = None,
        dry_run: bool = False,
    ) -> tuple[int, int]:
        """Delete finished rollouts with all that belongs to them; answers how many were deleted and kept."""
        request = pb.DeleteRolloutsRequest(filter=self._chosen(rollout_ids, filter), dry_run=dry_run)
        response = await self.call(self.bound.store.DeleteRollouts, request)
        return response.deleted, response.kept

    async def wait_for_rollouts(
        self,
        *,
        rollout_ids: Sequence[str] = (),
        group_ids: Sequence[str] = (),
        timeout: float | None = None,  # noqa: ASYNC109  # the wait is the store's; the name is Agent Lightning's
        until: WaitUntil | str = WaitUntil.TERMINAL,
        any: bool = False,
        run_id: str | None = None,
    ) -> list[Rollout]:
        """Wait until all (or any) of the rollouts are finished (or sealed too); unknown ids are ignored.

        ``group_ids`` stand for whatever rollouts these groups of the run have. ``timeout`` in seconds:
        ``None`` waits for ever, 0 asks once. Answers those that are there: by id in the order given, then
        by group.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        wanted = list(dict.fromkeys(rollout_ids))
        found: dict[str, Rollout] = {}
        for start in range(0, max(1, len(wanted)), _WAIT_IDS):
            request = pb.WaitRolloutsRequest(
                rollout_ids=wanted[start : start + _WAIT_IDS],
                run_id=self.run_or_default(run_id),
                group_ids=() if start else group_ids,
                until=WaitUntil.parse(until).number,
                any=any,
            )
            await self._wait_part(request, deadline, found)
            if any and found:
                break
        ordered = {rollout_id: found.pop(rollout_id) for rollout_id in wanted if rollout_id in found}
        return [*ordered.values(), *found.values()]

    async def _wait_part(
        self, request: pb.WaitRolloutsRequest, deadline: float | None, found: dict[str, Rollout]
    ) -> None:
        while True:
            left = _LONG_POLL_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            wait = min(left, _LONG_POLL_SECONDS)
            request.ClearField("timeout")
            request.MergeFrom(pb.WaitRolloutsRequest(timeout=to_duration(wait)))
            # Each try may last as long as the poll; the retries around it bridge a restart of the store.
            response = await self.call(self.bound.store.WaitRollouts, request, try_timeout=wait + 15.0)
            for rollout in response.rollouts:
                found[rollout.rollout_id] = Rollout.from_proto(rollout)
            if response.further_rollout_ids:
                listed = await self.query_rollouts(rollout_id_in=response.further_rollout_ids, run_id="*")
                found.update((rollout.rollout_id, rollout) for rollout in listed)
            over = deadline is not None and time.monotonic() >= deadline
            if response.complete or (request.any and found) or over:
                return
            # What is there need not be sent again; of groups the store alone knows what they have.
            rest = [rollout_id for rollout_id in request.rollout_ids if rollout_id not in found]
            del request.rollout_ids[:]
            request.rollout_ids.extend(rest)

    def watch_rollouts(
        self,
        *,
        filter: rollout_pb2.RolloutFilter | None = None,
        cursor: int = 0,
        include_existing: bool = False,
        include_attempts: bool = False,
    ) -> AsyncIterator[Watched[Rollout]]:
        """Rollouts as they change, resumed by cursor after every disconnect."""
        request = pb.WatchRolloutsRequest(
            filter=filter or rollout_filter(run_id=self.run_id),
            cursor=cursor,
            include_existing=include_existing,
            include_attempts=include_attempts,
        )
        return watch(
            self,
            lambda bound: bound.store.WatchRollouts,
            request,
            lambda message: map(rollout_from_proto, message.rollouts),
            lambda message: message.deleted_rollout_ids,
        )

    def _chosen(
        self, rollout_ids: Sequence[str] | None, filter: rollout_pb2.RolloutFilter | None
    ) -> rollout_pb2.RolloutFilter:
        if (rollout_ids is None) == (filter is None):
            raise ValueError("name the rollouts either by rollout_ids or by filter")
        if filter is not None:
            return filter
        if not rollout_ids:
            raise ValueError("rollout_ids is empty; name at least one rollout")
        return rollout_filter(run_id="*", rollout_id_in=rollout_ids)

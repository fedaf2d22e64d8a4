"""WaitRollouts: a long poll that is woken by the event log's hub and reads only what has changed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from functools import partial

from agl_grpc.store import limits
from agl_grpc.store.rollouts import lifecycle
from agl_grpc.store.rollouts.attempts import ROLLOUT
from agl_grpc.store.rollouts.encode import load_listed
from agl_grpc.store.rollouts.filters import run_key_of
from agl_grpc.store.rollouts.rows import ids_of
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.reads import position
from agl_grpc.store.storage.sql import marks, padded
from agl_grpc.store.store import Store
from agl_grpc.v1 import store_service_pb2

_CHUNK = 500
_PADDED = 256
_LOOK_AGAIN = 5.0


class Wait:
    """One wait.

    Args:
        store: The store.
        rollout_ids: Rollouts; unknown ones are ignored.
        run_id: The run of the groups.
        group_ids: Groups, with whatever rollouts they have or get.
        sealed: Whether to wait for sealing, not only for the end.
        until_any: Whether one rollout is enough.
    """

    def __init__(
        self,
        store: Store,
        rollout_ids: Collection[str],
        run_id: str,
        group_ids: Collection[str],
        *,
        sealed: bool,
        until_any: bool,
    ) -> None:
        self._store = store
        self._ids = rollout_ids
        self._run_id = run_id
        self._group_ids = group_ids
        self._sealed = sealed
        self._any = until_any
        self._pending: set[int] = set()
        self._there: dict[int, None] = {}
        self._groups: list[int] = []
        self._run_key: int | None = None
        self.position = 0

    async def run(self, seconds: float) -> store_service_pb2.WaitRolloutsResponse:
        """Waits at most so long; answers the rollouts that are there, and whether those are all.

        Raises:
            StoreError: NOT_FOUND for an unknown run.
        """
        end = time.monotonic() + seconds
        await self._store.read(self._begin)
        waiter = self._store.hub.add(
            [ROLLOUT],
            run_keys=None if self._run_key is None else [self._run_key],
            refs=None if self._groups else self._pending,
        )
        try:
            # What changed before the waiter was known to the hub is found by looking once more.
            await self._store.read(partial(self._look, None))
            while not self._done() and not self._store.hub.closed:
                left = end - time.monotonic()
                if left <= 0:
                    break
                # A wake-up is a hint only: correctness rests on looking again.
                woken = await waiter.wait(min(left, _LOOK_AGAIN))
                changed = waiter.take() if woken and not self._groups else None
                await self._store.read(partial(self._look, changed))
        finally:
            self._store.hub.remove(waiter)
        return await self._collect()

    def _done(self) -> bool:
        return not self._pending or (self._any and bool(self._there))

    def _begin(self, db: Connection) -> None:
        if self._group_ids:
            self._run_key = run_key_of(db, self._run_id)
            self._groups = [
                key
                for (key,) in db.execute(
                    "SELECT group_key FROM groups WHERE run_key = ? AND group_id IN "
                    f"({marks(len(self._group_ids))})",
                    [self._run_key, *self._group_ids],
                )
            ]
            if self._ids:
                # Rollouts by id may be of any run.
                self._run_key = None
        for some in padded(list(self._ids), _PADDED):
            known = f"SELECT rollout_key FROM rollouts WHERE rollout_id IN ({marks(len(some))})"
            self._pending.update(key for (key,) in db.execute(known, some))
        self._look(None, db)

    def _look(self, changed: Iterable[int] | None, db: Connection) -> None:
        self.position = position(db)
        for group_key in self._groups:
            members = db.execute("SELECT rollout_key FROM rollouts WHERE group_key = ?", (group_key,))
            self._pending.update(key for (key,) in members if key not in self._there)
        keys = list(self._pending if changed is None else self._pending.intersection(changed))
        for start in range(0, len(keys), _CHUNK):
            part = keys[start : start + _CHUNK]
            found = {
                key: self._is_there(status, sealed)
                for key, status, sealed in db.execute(
                    "SELECT rollout_key, status, sealed FROM rollouts "
                    f"WHERE rollout_key IN ({marks(len(part))})",
                    part,
                )
            }
            for key in part:
                # A rollout that was deleted meanwhile is as unknown as one that never was.
                if found.get(key, True):
                    self._pending.discard(key)
                    if key in found:
                        self._there[key] = None

    def _is_there(self, status: int, sealed: int) -> bool:
        return status in lifecycle.ROLLOUT_TERMINAL and (bool(sealed) or not self._sealed)

    async def _collect(self) -> store_service_pb2.WaitRolloutsResponse:
        answer = store_service_pb2.WaitRolloutsResponse(complete=not self._pending, position=self.position)
        keys, size = sorted(self._there), 0
        while keys:
            part, keys = keys[:_PADDED], keys[_PADDED:]
            if size > limits.ANSWER_BYTES:
                answer.further_rollout_ids.extend(await self._store.read(partial(ids_of, keys=part)))
                continue
            listed = partial(load_listed, keys=part, with_attempts=False, most_bytes=limits.ANSWER_BYTES)
            found = await self._store.read(listed)
            answer.rollouts.extend(one.rollout for one in found)
            size += sum(one.ByteSize() for one in found)
            if size > limits.ANSWER_BYTES:
                # Those that were deleted meanwhile are unknown again.
                shown = {one.rollout.rollout_id for one in found}
                rest = await self._store.read(partial(ids_of, keys=part))
                answer.further_rollout_ids.extend(one for one in rest if one not in shown)
        return answer

"""Watches under random writers and random reconnects, held against the event log (R23).

Every message of a watch covers the log from the cursor before to its own. It must name exactly what the log
says of that stretch: nothing missing, nothing twice, nothing that did not change.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from agl_grpc.store.events import watches
from agl_grpc.store.spans import watch as span_watches
from agl_grpc.v1 import (
    event_pb2,
    policy_pb2,
    rollout_pb2,
    span_pb2,
    store_service_pb2,
    trainer_service_pb2,
)
from tests.store.rig import FAILED, SUCCEEDED, Rig, running

_DELETED = int(event_pb2.EVENT_KIND_DELETED)


@dataclass(frozen=True)
class Kind:
    """One kind of watch.

    Attributes:
        name: For people.
        entity: The log entries that it is about.
        open: Opens a watch after a position.
        seen: What a message names, in order.
        named: The names of a log entry (ref, low, high) in the database.
    """

    name: str
    entity: int
    open: Callable[[Rig, int], Any]
    seen: Callable[[Any], list[str]]
    named: Callable[[Any, int, int, int], list[str]]


def _one(sql: str) -> Callable[[Any, int, int, int], list[str]]:
    return lambda db, ref, _low, _high: [str(name) for (name,) in db.execute(sql, (ref,))]


def _spans(db: Any, ref: int, low: int, high: int) -> list[str]:
    rows = db.execute(
        "SELECT span_ref FROM spans WHERE attempt_key = ? AND span_key BETWEEN ? AND ? ORDER BY span_key",
        (ref, low, high),
    )
    return [(name % 2**64).to_bytes(8, "big").hex() for (name,) in rows]


KINDS = (
    Kind(
        "rollouts",
        event_pb2.ENTITY_KIND_ROLLOUT,
        lambda rig, at: rig.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest(cursor=at)),
        lambda answer: [one.rollout.rollout_id for one in answer.rollouts] + list(answer.deleted_rollout_ids),
        _one("SELECT rollout_id FROM rollouts WHERE rollout_key = ?"),
    ),
    Kind(
        "attempts",
        event_pb2.ENTITY_KIND_ATTEMPT,
        lambda rig, at: rig.store.WatchAttempts(store_service_pb2.WatchAttemptsRequest(cursor=at)),
        lambda answer: [one.attempt_id for one in answer.attempts],
        _one("SELECT attempt_id FROM attempts WHERE attempt_key = ?"),
    ),
    Kind(
        "resources",
        event_pb2.ENTITY_KIND_RESOURCES,
        lambda rig, at: rig.store.WatchResources(store_service_pb2.WatchResourcesRequest(cursor=at)),
        lambda answer: [f"{one.resources_id}@{one.version}" for one in answer.resources],
        _one("SELECT resources_id || '@' || version FROM resources WHERE resource_key = ?"),
    ),
    Kind(
        "spans",
        event_pb2.ENTITY_KIND_SPANS,
        lambda rig, at: rig.store.WatchSpans(store_service_pb2.WatchSpansRequest(cursor=at)),
        lambda answer: [one.span.span_id.hex() for one in answer.spans],
        _spans,
    ),
    Kind(
        "policy versions",
        event_pb2.ENTITY_KIND_POLICY_VERSION,
        lambda rig, at: rig.trainer.WatchPolicyVersions(
            trainer_service_pb2.WatchPolicyVersionsRequest(cursor=at)
        ),
        lambda answer: [str(one.policy_version) for one in answer.policy_versions],
        _one("SELECT policy_version FROM policy_versions WHERE policy_key = ?"),
    ),
)


@dataclass(frozen=True)
class Stretch:
    """What one message said of the log between two positions."""

    after: int
    upto: int
    names: list[str]


@dataclass
class Counts:
    """How much was seen."""

    messages: int = 0
    names: int = 0
    reconnects: int = 0


@dataclass
class Follower:
    """A watcher that hangs up at random and comes back with its cursor."""

    kind: Kind
    start: int
    choose: random.Random
    stretches: list[Stretch] = field(default_factory=list)
    reconnects: int = 0

    async def follow(self, rig: Rig, end: asyncio.Future[int]) -> None:
        """Follows until it has heard of everything up to `end`."""
        cursor = self.start
        while not (end.done() and cursor >= end.result()):
            call = self.kind.open(rig, cursor)
            for _ in range(self.choose.randint(1, 6)):
                answer = await call.read()
                self.stretches.append(Stretch(cursor, answer.cursor, self.kind.seen(answer)))
                assert answer.checkpoint == (not self.stretches[-1].names), answer
                cursor = answer.cursor
            call.cancel()
            self.reconnects += 1

    def check(self, db: Any) -> list[str]:
        """What is wrong, in words; empty = nothing."""
        log = db.execute(
            "SELECT position, kind, ref, low, high, entity_id FROM events WHERE entity = ? AND position > ? "
            "ORDER BY position",
            (self.kind.entity, self.start),
        ).fetchall()
        gone = {ref: name for _, kind, ref, _, _, name in log if kind == _DELETED}
        wrong = []
        for stretch in self.stretches:
            due: dict[str, None] = {}
            may_miss: set[str] = set()
            for position, kind, ref, low, high, _ in log:
                if stretch.after < position <= stretch.upto:
                    due.update(dict.fromkeys(self.kind.named(db, ref, low, high) or [gone[ref]]))
                    if ref in gone and kind != _DELETED:
                        # Deleted before the message was made: only its end is told.
                        may_miss.add(gone[ref])
                    elif kind == _DELETED:
                        may_miss.discard(gone[ref])
            names = stretch.names
            if stretch.upto < stretch.after:
                wrong.append(f"{self.kind.name}: the cursor fell from {stretch.after} to {stretch.upto}")
            if len(set(names)) < len(names):
                wrong.append(f"{self.kind.name}: named twice in one message: {stretch}")
            if missing := [name for name in due if name not in names and name not in may_miss]:
                wrong.append(f"{self.kind.name}: missing {missing} in {stretch}")
            if extra := [name for name in names if name not in due]:
                wrong.append(f"{self.kind.name}: not in the log: {extra} in {stretch}")
            # Deletions are told apart from what changed, so they have no order with it.
            kept = [name for name in names if name not in gone.values()]
            if not missing and not extra and kept != [name for name in due if name in set(kept)]:
                wrong.append(f"{self.kind.name}: out of order: {stretch}")
        return wrong


class Writer:
    """Changes things at random."""

    def __init__(self, rig: Rig, choose: random.Random) -> None:
        self._rig = rig
        self._choose = choose
        self._leased: list[Any] = []
        self._names = 0
        self._policies = 0

    async def step(self) -> None:
        """One random change."""
        steps = (self._enqueue, self._lease, self._complete, self._spans, self._publish, self._policy)
        await self._choose.choice((*steps, self._spans, self._cancel_and_delete))()

    async def one_of_each(self) -> None:
        """One change of each kind."""
        for step in (self._enqueue, self._lease, self._spans, self._publish, self._policy):
            await step()

    async def _enqueue(self) -> None:
        specs = [rollout_pb2.RolloutSpec() for _ in range(self._choose.randint(1, 5))]
        await self._rig.enqueue(*specs)

    async def _lease(self) -> None:
        self._leased += await self._rig.lease(limit=self._choose.randint(1, 3))

    async def _complete(self) -> None:
        if self._leased:
            one = self._leased.pop(self._choose.randrange(len(self._leased)))
            await self._rig.complete(one, status=self._choose.choice((SUCCEEDED, FAILED)))

    async def _spans(self) -> None:
        request = store_service_pb2.AppendSpansRequest()
        count = self._choose.choice((1, 3, 30, 1200))
        for leased in self._choose.sample(self._leased, min(3, len(self._leased))):
            names = (leased.attempt.rollout_id, leased.attempt.attempt_id)
            spans = [span_pb2.Span(span_id=os.urandom(8), name="step") for _ in range(count)]
            request.groups.add(rollout_id=names[0], attempt_id=names[1], spans=spans)
        await self._rig.store.AppendSpans(request)

    async def _publish(self) -> None:
        name = f"rs{self._choose.randint(1, 3)}"
        request = store_service_pb2.PublishResourcesRequest(resources_id=name)
        await self._rig.store.PublishResources(request)

    async def _policy(self) -> None:
        if self._policies:
            request = trainer_service_pb2.AbortPolicyVersionRequest(model="m", policy_version=self._policies)
            await self._rig.trainer.AbortPolicyVersion(request)
        self._policies += 1
        source = policy_pb2.WeightSource(path="/weights")
        await self._rig.trainer.PreparePolicyVersion(
            trainer_service_pb2.PreparePolicyVersionRequest(
                model="m", policy_version=self._policies, source=source
            )
        )

    async def _cancel_and_delete(self) -> None:
        # Rollouts that never had an attempt: the attempts' names stay known to the check.
        waiting = f"d{self._names}"
        self._names += 1
        await self._rig.enqueue(rollout_id=waiting, queue="nobody")
        await self._rig.cancel(waiting)
        request = store_service_pb2.DeleteRolloutsRequest(filter={"rollout_id_in": [waiting]})
        await self._rig.store.DeleteRollouts(request)


class Mirror:
    """Keeps a copy of all rollouts' states: lists them, then watches from the position of the list."""

    def __init__(self, choose: random.Random) -> None:
        self.states: dict[str, int] = {}
        self._choose = choose

    async def follow(self, rig: Rig, end: asyncio.Future[int]) -> None:
        """Lists page by page while the writers go on, then follows."""
        request = store_service_pb2.ListRolloutsRequest(page_size=3)
        cursor = 0
        while True:
            page = await rig.store.ListRollouts(request)
            cursor = cursor or page.position
            self.states.update({one.rollout.rollout_id: one.rollout.status for one in page.rollouts})
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        watch = rig.store.WatchRollouts(store_service_pb2.WatchRolloutsRequest(cursor=cursor))
        while not (end.done() and cursor >= end.result()):
            answer = await watch.read()
            self.states.update({one.rollout.rollout_id: one.rollout.status for one in answer.rollouts})
            for gone in answer.deleted_rollout_ids:
                self.states.pop(gone, None)
            cursor = answer.cursor
        watch.cancel()


@contextmanager
def quick_checkpoints() -> Iterator[None]:
    """Quiet watches say where they stand twenty times a second."""
    with (
        mock.patch.object(watches, "CHECKPOINT_SECONDS", 0.05),
        mock.patch.object(span_watches, "CHECKPOINT_SECONDS", 0.05),
    ):
        yield


async def run(seed: int, steps: int, database: Path | str | None = None) -> Counts:
    """One random history; fails with the seed and what is wrong.

    Args:
        seed: Of all choices.
        steps: How many changes are made while watchers follow.
        database: An SQLite file or a database's URL, empty; None = a throw-away file.
    """
    choose = random.Random(seed)
    with quick_checkpoints():
        async with running(database) as rig:
            writer = Writer(rig, choose)
            for _ in range(choose.randint(0, 5)):
                await writer.step()
            followers, mirror = await _race(rig, writer, steps, choose)
            wrong = [
                line
                for follower in followers
                for line in await rig.server.store.read(follower.check)  # one read transaction each
            ]
            now = await rig.server.store.read(
                lambda db: dict(db.execute("SELECT rollout_id, status FROM rollouts"))
            )
    if mirror.states != now:
        differing = dict(mirror.states.items() ^ now.items())
        wrong.append(f"list-then-watch ended with another state than the store: {differing}")
    assert not wrong, f"seed {seed}:\n" + "\n".join(wrong[:5])
    return Counts(
        sum(len(follower.stretches) for follower in followers),
        sum(len(stretch.names) for follower in followers for stretch in follower.stretches),
        sum(follower.reconnects for follower in followers),
    )


async def _race(rig: Rig, writer: Writer, steps: int, choose: random.Random) -> tuple[list[Follower], Mirror]:
    start = await last_position(rig)
    end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    followers = [Follower(kind, start, random.Random(choose.random())) for kind in KINDS for _ in range(2)]
    mirror = Mirror(choose)
    everyone: list[Awaitable[None]] = [follower.follow(rig, end) for follower in followers]
    async with asyncio.TaskGroup() as tasks:
        for one in (*everyone, mirror.follow(rig, end)):
            tasks.create_task(one)  # type: ignore[arg-type] # coroutines all
        for _ in range(steps):
            await writer.step()
        end.set_result(await last_position(rig))
    return followers, mirror


async def last_position(rig: Rig) -> int:
    """The newest position of the log."""
    answer = await rig.store.GetStatistics(store_service_pb2.GetStatisticsRequest())
    return int(answer.last_position)

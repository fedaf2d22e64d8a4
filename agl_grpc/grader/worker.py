"""The grader worker: sealed attempts in, verdicts out.

Each verdict is a row of rewards, and the row is the cache: what a grader's version has judged is not judged
again. Its revision is stated (the newest known + 1), so of two workers that judge one attempt only one is
recorded. Several workers share the work by the attempts' ids (`part`); what another one has left lying for
`patience` seconds is taken over. A worker that is killed loses nothing: its successor reads what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from agl_grpc.client import StoreClient
from agl_grpc.client.errors import AlreadyExists
from agl_grpc.client.filters import rollout_filter
from agl_grpc.client.watch import Watched
from agl_grpc.grader.base import Grader
from agl_grpc.grader.combined import Graders
from agl_grpc.grader.conversation import Decode
from agl_grpc.grader.grade import Grade, GraderFailed
from agl_grpc.grader.isolated import GraderProcesses, graded
from agl_grpc.grader.submission import Submission
from agl_grpc.grader.verdict import Verdict, ask
from agl_grpc.model import AttemptedRollout, Reward, Rollout, RolloutStatus
from agl_grpc.v1 import rollout_pb2

log = logging.getLogger(__name__)

_AT_ONCE = 64
_REMEMBERED = 100_000


@dataclass
class Counts:
    """What a worker has done: verdicts by grader and outcome, and those that were there already."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    attempts: int = 0

    def add(self, grader: str, outcome: str) -> None:
        """Count one verdict."""
        self.outcomes.setdefault(grader, Counter())[outcome] += 1

    def total(self, outcome: str) -> int:
        """How often that came out, over all graders."""
        return sum(counter[outcome] for counter in self.outcomes.values())


class GraderWorker:
    """Grades succeeded, sealed attempts of a run.

    Args:
        client: Of the run, with a credential that may put rewards.
        graders: Who judges.
        concurrency: Verdicts under way at once.
        processes: Processes for isolated graders; None = as many as the machine has processors.
        decode: Token ids to text, for calls of which only tokens were recorded.
        part: This worker's share as (place from 0, of how many).
        patience: Seconds after which an attempt of another worker's share is taken over.
        again: Also judge what this version has judged.
    """

    def __init__(
        self,
        client: StoreClient,
        graders: Graders,
        *,
        concurrency: int = 16,
        processes: int | None = None,
        decode: Decode | None = None,
        part: tuple[int, int] = (0, 1),
        patience: float = 60.0,
        again: bool = False,
    ) -> None:
        self.counts = Counts()
        self.client = client
        self._graders = graders
        self._places = {grader.name: place for place, grader in enumerate(graders)}
        self._slots = asyncio.Semaphore(concurrency)
        size = min(concurrency, processes or os.cpu_count() or 1)
        isolated = any(grader.isolated for grader in graders)
        self._processes = GraderProcesses(_isolated_only(graders), size) if isolated else None
        self._decode = decode
        self._part = part
        self._patience = patience
        self._again = again
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._todo: asyncio.Queue[AttemptedRollout] = asyncio.Queue()

    async def open(self) -> None:
        """Makes the graders ready; raises `GraderFailed` when one can never grade."""
        for grader in self._graders:
            await grader.open()

    async def close(self) -> None:
        """Ends what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._processes is not None:
            await self._processes.close()
        for grader in self._graders:
            await grader.close()

    async def run(self) -> None:
        """Grades what is there and what comes, until it is cancelled."""
        serving = asyncio.create_task(self._serve())
        try:
            mine = rollout_filter(run_id=self.client.run_id, status_in=[RolloutStatus.SUCCEEDED])
            changes = self.client.watch_rollouts(filter=mine, include_existing=True, include_attempts=True)
            watching = asyncio.create_task(self._watch(changes))
            done, _ = await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            serving.cancel()
            with contextlib.suppress(UnboundLocalError):
                watching.cancel()

    async def grade_all(
        self,
        filter: rollout_pb2.RolloutFilter | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> Counts:
        """Grades the succeeded rollouts that are there; `progress(done, of)` is told as it goes."""
        chosen = filter or rollout_filter(run_id=self.client.run_id)
        rollouts = await self.client.query_rollouts(filter=chosen)
        mine = [rollout for rollout in rollouts if _is_ready(rollout)]
        for start in range(0, len(mine), _AT_ONCE):
            await self._grade_some(mine[start : start + _AT_ONCE])
            progress(min(start + _AT_ONCE, len(mine)), len(mine))
        return self.counts

    async def _watch(self, changes: AsyncIterator[Watched[Rollout]]) -> None:
        loop = asyncio.get_running_loop()
        async for change in changes:
            for rollout in change.items:
                if not _is_ready(rollout) or rollout.attempt.attempt_id in self._seen:
                    continue
                self._seen[rollout.attempt.attempt_id] = None
                if len(self._seen) > _REMEMBERED:
                    self._seen.popitem(last=False)
                place, of = self._part
                if zlib.crc32(rollout.attempt.attempt_id.encode()) % of == place:
                    self._todo.put_nowait(rollout)
                else:
                    loop.call_later(self._patience, self._todo.put_nowait, rollout)

    async def _serve(self) -> None:
        waiting = asyncio.Semaphore(2)  # one batch is read while another is graded
        while True:
            some = [await self._todo.get()]
            while len(some) < _AT_ONCE and not self._todo.empty():
                some.append(self._todo.get_nowait())
            await waiting.acquire()
            task = asyncio.create_task(self._grade_some(some))
            self._tasks.add(task)

            def ended(task: asyncio.Task[None]) -> None:
                self._tasks.discard(task)
                waiting.release()
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.error("attempts could not be graded, the next start tries again: %s", error)

            task.add_done_callback(ended)

    async def _grade_some(self, rollouts: Sequence[AttemptedRollout]) -> None:
        """Reads, grades and records some attempts."""
        if not rollouts:
            return
        known = await self._known(rollouts)
        todo: list[tuple[AttemptedRollout, Grader, int]] = []
        for rollout in rollouts:
            self.counts.attempts += 1
            for grader in self._graders:
                revision, version = known.get((rollout.attempt.attempt_id, grader.name), (0, ""))
                if revision and version == grader.version and not self._again:
                    self.counts.add(grader.name, "cached")
                else:
                    todo.append((rollout, grader, revision + 1))
        if not todo:
            return
        submissions = await self._read({rollout.rollout_id: rollout for rollout, _, _ in todo})
        await asyncio.gather(*(self._one(r, g, rev, submissions[r.rollout_id]) for r, g, rev in todo))

    async def _known(self, rollouts: Sequence[AttemptedRollout]) -> dict[tuple[str, str], tuple[int, str]]:
        """Newest revision and version of what the graders have said, by attempt and grader."""
        found: dict[tuple[str, str], tuple[int, str]] = {}
        for reward in await self.client.query_rewards([rollout.rollout_id for rollout in rollouts]):
            if reward.grader == reward.name and reward.step is None and not reward.target_span_id:
                found[reward.attempt_id, reward.name] = (reward.revision, reward.grader_version or "")
        return found

    async def _read(self, rollouts: Mapping[str, AttemptedRollout]) -> dict[str, Submission]:
        spans: dict[str, list[bytes]] = {rollout_id: [] for rollout_id in rollouts}
        async for span in self.client.export_spans(rollout_ids=list(rollouts)):
            if span.attempt_id == rollouts[span.rollout_id].attempt.attempt_id:
                spans[span.rollout_id].append(span.SerializeToString())
        return {
            rollout_id: Submission.from_stored(
                rollout, rollout.attempt, spans[rollout_id], decode=self._decode
            )
            for rollout_id, rollout in rollouts.items()
        }

    async def _one(
        self, rollout: AttemptedRollout, grader: Grader, revision: int, submission: Submission
    ) -> None:
        async with self._slots:
            verdict = await ask(grader, submission, self._try)
        rewards = verdict.rewards(rollout.rollout_id, rollout.attempt.attempt_id, revision)
        await self._record(grader, verdict, rewards)

    async def _record(self, grader: Grader, verdict: Verdict, rewards: Sequence[Reward]) -> None:
        try:
            await self.client.put_rewards(rewards)
        except AlreadyExists:  # another worker was first: its verdict stands
            self.counts.add(grader.name, "cached")
            return
        self.counts.add(grader.name, verdict.outcome)
        if verdict.failure is not None:
            log.warning("%s on %s: %s", grader.id, rewards[0].rollout_id, verdict.failure)

    async def _try(self, grader: Grader, submission: Submission) -> Grade:
        if grader.isolated and self._processes is not None:
            return await self._processes.grade(self._places[grader.name], submission, grader.timeout)
        work = graded(grader, submission)
        try:
            async with asyncio.timeout(grader.timeout):
                if grader.is_async():
                    return await work
                # In a thread: it can be given up, not stopped.
                return await asyncio.to_thread(asyncio.run, work)
        except TimeoutError:
            raise GraderFailed(
                f"the grader took longer than {grader.timeout:g} s", outcome="timeout"
            ) from None


def _is_ready(rollout: Rollout) -> TypeGuard[AttemptedRollout]:
    return (
        isinstance(rollout, AttemptedRollout)
        and rollout.status is RolloutStatus.SUCCEEDED
        and rollout.attempt.sealed
    )


def _isolated_only(graders: Graders) -> list[Grader | None]:
    """Graders by their places; those that run in the worker itself need not travel."""
    return [grader if grader.isolated else None for grader in graders]

"""Calls that name no attempt, recorded as rollouts of their own: learning from production traffic."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
import uuid
from typing import Any, Protocol

import grpc

from agl_grpc.interceptor.attribution import Attribution
from agl_grpc.interceptor.capture.deltas import AttemptKey
from agl_grpc.interceptor.capture.sink import CapturedCall
from agl_grpc.v1 import (
    attempt_pb2,
    common_pb2,
    rollout_pb2,
    run_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
)

logger = logging.getLogger("agl_grpc.interceptor")

_RPC_TIMEOUT = 10.0
_WAITING = 1000
_IDLE_SECONDS = 300.0
_SWEEP_SECONDS = 10.0
# What the store takes as a rollout's id.
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Journal(Protocol):
    """The way of captured calls to the store."""

    def announce(self, attempt: AttemptKey, span_id: bytes, started: int) -> None:
        """A call begins."""
        ...

    def submit(self, call: CapturedCall) -> asyncio.Future[None]:
        """A call ended; the future resolves when it is durable."""
        ...


@dataclasses.dataclass
class _Session:
    """Calls that belong together, as one rollout."""

    key: str
    started: asyncio.Task[tuple[str, str]]
    used: float = 0.0
    running: int = 0


class ExternalTraffic:
    """Gives each session of calls without attribution a rollout in a run of its own, after the answer.

    A session is what clients name by ``x-agl-session``; a call without one is a session by itself. It ends
    after five minutes without a call. Its rollout is ``RUN.SESSION``: whoever knows the session can give the
    reward. A session that goes on after its end, or on another engine, has further ones, whose ids end with a
    random part. At most 1,000 calls wait for the store; further ones are counted and
    dropped: serving them never depends on it.
    """

    def __init__(self, channel: grpc.aio.Channel, journal: Journal, run_id: str) -> None:
        self._stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        self._journal = journal
        self._run_id = run_id
        self._run_made = False
        self._sessions: dict[str, _Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper = asyncio.create_task(self._sweep())
        self.recorded = 0
        self.dropped = 0

    def submit(self, session: str, call: CapturedCall) -> None:
        """Record a finished call; returns at once."""
        if len(self._tasks) >= _WAITING:
            self.dropped += 1
            return
        task = asyncio.create_task(self._record(session, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, grace: float = 5.0) -> None:
        """Finish what is under way and end all sessions, within `grace` seconds."""
        self._sweeper.cancel()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ends = [self._end(session) for session in list(self._sessions.values())]
        await asyncio.wait_for(asyncio.gather(*ends, return_exceptions=True), grace)

    async def _record(self, name: str, call: CapturedCall) -> None:
        session = self._session(name or uuid.uuid4().hex)
        session.running += 1
        session.used = time.monotonic()
        try:
            call.attempt = await asyncio.shield(session.started)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            self._sessions.pop(session.key, None)
            self.dropped += 1
            logger.warning("a call without attribution is not recorded: %s", error)
            return
        finally:
            session.running -= 1
        # Announced, so that the rollout's end does not seal it before its record is in the store.
        self._journal.announce(call.attempt, call.span_id, call.started)
        await self._journal.submit(call)
        self.recorded += 1
        if not name:
            await self._end(session)

    def _session(self, key: str) -> _Session:
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = _Session(key, asyncio.create_task(self._start(key)))
        return session

    async def _start(self, session: str) -> tuple[str, str]:
        if not self._run_made:
            await self._make_run()
        wanted = f"{self._run_id}.{session}"
        if not _ID.fullmatch(wanted):
            return await self._start_as("")
        try:
            return await self._start_as(wanted)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            another = f"{wanted}.{uuid.uuid4().hex[:8]}"
            return await self._start_as(another if _ID.fullmatch(another) else "")

    async def _start_as(self, rollout_id: str) -> tuple[str, str]:
        label = common_pb2.Label(key="source", value="external")
        request = store_service_pb2.StartRolloutRequest(
            request_id=uuid.uuid4().hex,
            run_id=self._run_id,
            rollout=rollout_pb2.RolloutSpec(
                rollout_id=rollout_id, mode=rollout_pb2.ROLLOUT_MODE_TRAIN, labels=[label]
            ),
        )
        started = (await self._stub.StartRollout(request, timeout=_RPC_TIMEOUT)).rollout
        return started.rollout.rollout_id, started.attempt.attempt_id

    async def _make_run(self) -> None:
        request = store_service_pb2.CreateRunRequest(
            request_id=uuid.uuid4().hex, run=run_pb2.Run(run_id=self._run_id)
        )
        try:
            await self._stub.CreateRun(request, timeout=_RPC_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
        self._run_made = True

    async def _end(self, session: _Session) -> None:
        """The session's rollout has succeeded: nothing more comes."""
        self._sessions.pop(session.key, None)
        try:
            rollout_id, attempt_id = await session.started
            attempt = attempt_pb2.Attempt(
                rollout_id=rollout_id, attempt_id=attempt_id, status=attempt_pb2.ATTEMPT_STATUS_SUCCEEDED
            )
            request = store_service_pb2.UpdateAttemptRequest(request_id=uuid.uuid4().hex, attempt=attempt)
            request.update_mask.paths.append("status")
            await self._stub.UpdateAttempt(request, timeout=_RPC_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            logger.warning("the rollout of a call without attribution is left open: %s", error.details())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = time.monotonic()
            for session in list(self._sessions.values()):
                if not session.running and now - session.used > _IDLE_SECONDS:
                    await self._end(session)


EXTERNAL = Attribution("external", "external", mode="train")
"""Stands in a record until its session has an attempt."""

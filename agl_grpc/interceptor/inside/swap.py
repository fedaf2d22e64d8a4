"""Weight swaps: staged while serving, swapped in under a short pause, each step bounded by a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

from agl_grpc.interceptor.inside.generate import GenerateWrapper
from agl_grpc.v1 import policy_pb2
from agl_grpc.weights.kept import kept_path

logger = logging.getLogger("agl_grpc.interceptor")

_SHORTEST_POLL, _LONGEST_POLL = 0.002, 0.02
_RPC_TIMEOUT = 60.0
_LOAD_TIMEOUT = 600.0
_LATE_COMMIT_GRACE = 10.0
"""Staged weights outlive their deadline by this many seconds, for a commit that was on its way."""


class SwapError(Exception):
    """A step of a swap failed; the message is one line. The old weights go on serving."""


class EngineBroken(Exception):
    """The model's weights are neither the old nor the new ones: the engine must not serve."""


@dataclass(frozen=True)
class Staging:
    """A version whose weights are in staging memory on every worker."""

    policy_version: int
    transfer_id: str
    digest: str
    until: float


class Report(Protocol):
    """Tells the store how far this engine is."""

    async def __call__(
        self, policy_version: int, phase: int, *, digest: str = "", error: str = "", pause_ns: int = 0
    ) -> None:
        """Report one phase; does not raise when the store is away."""
        ...


@dataclass(frozen=True)
class Adapter:
    """An adapter that vLLM serves under a name: its number there, and the folder that it began with."""

    name: str
    number: int
    folder: str


class RunningCalls:
    """What becomes of calls of attempts that run when new weights come: see `Settings.running_on_swap`.

    Where an adapter is named, its calls alone are meant.
    """

    def __init__(self, wrapper: GenerateWrapper, how: str, limit: float, adapter: str = "") -> None:
        self._wrapper = wrapper
        self._how = how
        self._limit = limit
        self._adapter = adapter

    async def before_pause(self) -> None:
        """Let them end where they are to. Raises SwapError for those that had to and did not."""
        if self._how == "keep":
            return
        if not await self._wrapper.drained(self._limit, self._adapter) and self._how == "finish":
            left = self._wrapper.under_way(self._adapter)
            raise SwapError(f"{left} calls still ran after {self._limit:g} s")

    def in_pause(self) -> None:
        """End those that have had their time."""
        if self._how == "cut":
            reason = f"cut after {self._limit:g} s: new weights are being loaded"
            number = self._wrapper.cut(reason, self._adapter)
            if number:
                logger.warning("%d calls cut for new weights", number)


class WeightSwapper:
    """Acts on policy versions as the store announces them, one at a time.

    `engine_client` is vLLM's; its dev mode stays off. Generation stands still only from pause to resume. The
    weights that serve are also kept in the folder `keep` (None: they are not), so that an engine that starts
    again can go on with them. `running` says what becomes of running calls.

    Of an engine that serves several adapters, each has a swapper, which changes that `adapter` alone; they
    share `standstill`, so that one pauses and resumes the engine at a time.
    """

    def __init__(
        self,
        engine_client: Any,
        wrapper: GenerateWrapper,
        engine_id: str,
        report: Report,
        keep: Path | None = None,
        running: RunningCalls | None = None,
        adapter: Adapter | None = None,
        standstill: asyncio.Lock | None = None,
    ) -> None:
        self._adapter = adapter
        self._name = "" if adapter is None else adapter.name
        self._standstill = standstill or asyncio.Lock()
        self._keep = keep
        self._running = running or RunningCalls(wrapper, "keep", 0.0)
        self._client = engine_client
        self._wrapper = wrapper
        self._engine_id = engine_id
        self._report = report
        self._staging: Staging | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._preparing_version = -1
        self._expiry: asyncio.TimerHandle | None = None
        self.swapped = asyncio.Event()
        """Set while no swap is under way."""
        self.swapped.set()

    @property
    def swapping(self) -> bool:
        """Whether new weights are on their way into the engine: running calls end, or generation stands."""
        return not self.swapped.is_set()

    @property
    def _serving(self) -> int:
        return self._wrapper.version_of(self._name) if self._name else self._wrapper.policy_version

    async def on_version(self, version: policy_pb2.PolicyVersion) -> None:
        """Follow one state of a policy version. Raises EngineBroken when the model is half-loaded."""
        if version.status == policy_pb2.POLICY_VERSION_STATUS_PREPARING:
            await self._on_preparing(version)
        elif version.status == policy_pb2.POLICY_VERSION_STATUS_COMMITTED:
            await self._on_committed(version)
        elif version.status == policy_pb2.POLICY_VERSION_STATUS_ABORTED:
            await self._drop(version.policy_version, version.abort_reason or "aborted")

    async def close(self) -> None:
        """Give up what is under way."""
        await self._drop(self._preparing_version, "the engine stops")
        if self._staging is not None:
            await self._drop(self._staging.policy_version, "the engine stops")

    async def _on_preparing(self, version: policy_pb2.PolicyVersion) -> None:
        number = version.policy_version
        wanted = not version.source.engine_ids or self._engine_id in version.source.engine_ids
        known = number == self._preparing_version or (
            self._staging is not None and self._staging.transfer_id == version.source.group_id
        )
        if not wanted or known or number <= self._serving:
            return
        if self._staging is not None:
            await self._drop(self._staging.policy_version, f"replaced by version {number}")
        await self._drop(self._preparing_version, f"replaced by version {number}")
        self._preparing_version = number
        self._preparing = asyncio.create_task(self._prepare(version))

    async def _prepare(self, version: policy_pb2.PolicyVersion) -> None:
        number, transfer = version.policy_version, version.source.group_id
        timeout = version.deadline.ToNanoseconds() / 1e9 - time.time()
        try:
            await self._report(number, policy_pb2.ENGINE_PHASE_RECEIVING)
            if not version.source.rendezvous:
                raise SwapError(
                    "the version names no rendezvous: weights by path are not supported by this engine"
                )
            digest = await asyncio.wait_for(
                self._receive(transfer, version.source.rendezvous, timeout), timeout=max(timeout, 0.001)
            )
        except (SwapError, TimeoutError) as error:
            reason = str(error) or "the deadline passed before all weights had arrived"
            logger.warning("policy version %d not staged: %s", number, reason)
            await self._abort_workers(transfer, reason)
            self._preparing_version = -1
            await self._report(number, policy_pb2.ENGINE_PHASE_FAILED, error=reason)
            return
        until = (
            time.monotonic()
            + max(0.0, version.deadline.ToNanoseconds() / 1e9 - time.time())
            + _LATE_COMMIT_GRACE
        )
        self._staging = Staging(number, transfer, digest, until)
        self._preparing_version = -1
        self._expiry = asyncio.get_running_loop().call_later(
            until - time.monotonic(), lambda: asyncio.ensure_future(self._expire(number))
        )
        logger.info("policy version %d staged, digest %s", number, digest)
        await self._report(number, policy_pb2.ENGINE_PHASE_RECEIVED, digest=digest)

    async def _receive(self, transfer: str, endpoint: str, limit: float) -> str:
        """Have every worker receive the transfer; the digest that all of them computed."""
        if limit <= 0:
            raise SwapError("the deadline had passed before the engine heard of the version")
        keep = str(self._keep or "")
        await self._rpc("agl_prepare_weights", self._engine_id, transfer, endpoint, limit, keep, self._name)
        pause = _SHORTEST_POLL
        while True:
            states = await self._rpc("agl_weights_status", transfer, self._name)
            for state in states:
                if state["state"] in ("failed", "idle"):
                    raise SwapError(state["error"] or "the transfer was given up")
            if all(state["state"] == "received" for state in states):
                digests = {state["digest"] for state in states}
                if len(digests) > 1:
                    raise SwapError(f"workers received different weights: {sorted(digests)}")
                return str(digests.pop())
            # A worker cannot call us back through vLLM's executor: it is asked, while a transfer runs.
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL)

    async def _on_committed(self, version: policy_pb2.PolicyVersion) -> None:
        number = version.policy_version
        if number <= self._serving:
            return
        if self._preparing is not None and self._preparing_version == number:
            await asyncio.wait([self._preparing])
        staging = self._staging
        if staging is None or staging.policy_version != number:
            staging = await self._from_disk(version)
        if staging is None:
            return
        if version.weights_digest and version.weights_digest != staging.digest:
            reason = f"committed digest {version.weights_digest} is not the staged {staging.digest}"
            await self._drop(number, reason)
            await self._report(number, policy_pb2.ENGINE_PHASE_FAILED, digest=staging.digest, error=reason)
            return
        self._forget_staging()
        try:
            pause_ns = await self._swap(staging)
        except SwapError as error:
            logger.error("policy version %d not loaded: %s", number, error)
            await self._report(
                number, policy_pb2.ENGINE_PHASE_FAILED, digest=staging.digest, error=str(error)
            )
            return
        logger.info("policy version %d active after a pause of %.1f ms", number, pause_ns / 1e6)
        await self._report(number, policy_pb2.ENGINE_PHASE_ACTIVE, digest=staging.digest, pause_ns=pause_ns)

    async def _from_disk(self, version: policy_pb2.PolicyVersion) -> Staging | None:
        """Stage a committed version from what an earlier life of this engine has kept, if it has."""
        number, digest = version.policy_version, version.weights_digest
        reason = f"version {number} is committed but not staged here"
        if self._keep is not None and digest and kept_path(self._keep, digest).exists():
            transfer = f"kept/{number}"
            try:
                states = await self._rpc(
                    "agl_restore_weights", self._engine_id, transfer, str(self._keep), digest, self._name
                )
                errors = [state["error"] for state in states if state["error"]]
            except SwapError as error:
                errors = [str(error)]
            if not errors:
                logger.info("policy version %d taken back from disk", number)
                return Staging(number, transfer, digest, time.monotonic())
            reason += f": {errors[0]}"
        logger.warning("%s: the engine goes on with version %d", reason, self._serving)
        if self._engine_id in version.source.engine_ids or not version.source.engine_ids:
            await self._report(number, policy_pb2.ENGINE_PHASE_FAILED, error=reason)
        return None

    async def _swap(self, staging: Staging) -> int:
        """Let calls end, pause, load, set the version, resume; nanoseconds of standstill."""
        self.swapped.clear()
        try:
            await self._running.before_pause()
            async with self._standstill:
                started = time.monotonic_ns()
                errors = await self._exchange(staging)
        finally:
            self.swapped.set()
        if errors:
            raise SwapError(f"{errors[0]} (the old weights were restored)")
        return time.monotonic_ns() - started

    async def _exchange(self, staging: Staging) -> list[str]:
        """Pause, load, set the version, resume; what went wrong and was undone."""
        try:
            await self._pause()
            self._running.in_pause()
            errors = await self._load(staging)
            if not errors:
                self._wrapper.set_policy_version(staging.policy_version, staging.digest, self._name)
                await self._name_version(staging.policy_version)
        finally:
            await self._resume()
        return errors

    async def _name_version(self, number: int) -> None:
        """Tell vLLM the version. Raises EngineBroken: the new weights are loaded by now."""
        try:
            async with asyncio.timeout(_RPC_TIMEOUT):
                await self._wrapper.name_weights()
        except TimeoutError:
            raise EngineBroken(
                f"the engine did not take version {number} within {_RPC_TIMEOUT:g} s"
            ) from None

    async def _resume(self) -> None:
        """Go on generating. Raises EngineBroken when the engine does not."""
        try:
            async with asyncio.timeout(_RPC_TIMEOUT):
                await self._client.resume_generation()
        except TimeoutError:
            raise EngineBroken(f"the engine did not resume within {_RPC_TIMEOUT:g} s") from None

    async def _pause(self) -> None:
        """Stand still; sequences under way keep their place. Raises SwapError when the engine does not."""
        try:
            async with asyncio.timeout(_RPC_TIMEOUT):
                await self._client.pause_generation(mode="keep", clear_cache=True)
        except TimeoutError:
            raise SwapError(f"the engine did not pause within {_RPC_TIMEOUT:g} s") from None

    async def _load(self, staging: Staging) -> list[str]:
        """Load on every worker; what went wrong and was undone. Raises EngineBroken otherwise."""
        method, args = "agl_load_weights", (staging.transfer_id,)
        if self._adapter is not None:
            method, args = "agl_load_adapter", (staging.transfer_id, *astuple(self._adapter))
        try:
            states = await self._client.collective_rpc(method, timeout=_LOAD_TIMEOUT, args=args)
        except Exception as error:  # any failure of the call itself leaves the workers in an unknown state
            raise EngineBroken(f"loading policy version {staging.policy_version} failed: {error}") from error
        errors = [state["error"] for state in states if state["error"]]
        if errors and not (len(errors) == len(states) and all(state["rolled_back"] for state in states)):
            raise EngineBroken(
                f"loading policy version {staging.policy_version} failed half-way: {errors[0]}"
            )
        return errors

    async def _expire(self, number: int) -> None:
        if self._staging is not None and self._staging.policy_version == number:
            logger.warning("policy version %d was neither committed nor aborted in time: dropped", number)
            await self._drop(number, "the deadline passed")

    async def _drop(self, number: int, reason: str) -> None:
        """Give up a version that is being received or staged; nothing happens for others."""
        if self._preparing is not None and number >= 0 and self._preparing_version == number:
            self._preparing_version = -1
            self._preparing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._preparing
            await self._abort_workers("", reason)
        staging = self._staging
        if staging is not None and staging.policy_version == number:
            self._forget_staging()
            await self._abort_workers(staging.transfer_id, reason)

    async def _abort_workers(self, transfer: str, reason: str) -> None:
        """Free the workers' staging memory; a worker that cannot be asked must not stop the watch."""
        try:
            await self._rpc("agl_abort_weights", transfer, reason, self._name)
        except SwapError as error:
            logger.warning("staging memory of %s not freed: %s", transfer or "the current transfer", error)

    def _forget_staging(self) -> None:
        self._staging = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        """Call the worker extension on every worker. Raises SwapError."""
        try:
            answers = await self._client.collective_rpc(method, timeout=_RPC_TIMEOUT, args=args)
        except Exception as error:  # vLLM wraps whatever the worker raised
            raise SwapError(f"{method} failed on a worker: {error}") from error
        return list(answers)

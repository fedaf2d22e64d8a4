"""Attempts as the store knows them: whether they still run, in which mode, with which resources."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from agl_grpc.interceptor.attribution import Attribution, attribution_of_credential
from agl_grpc.interceptor.refusals import Refusal
from agl_grpc.model.resource import ProxyLLM, resource_from_proto
from agl_grpc.model.rollout import SEED_LABEL, seed_of
from agl_grpc.v1 import (
    attempt_pb2,
    resources_pb2,
    rollout_pb2,
    store_service_pb2,
    store_service_pb2_grpc,
)

logger = logging.getLogger("agl_grpc.interceptor")

_LOOKUP_SECONDS = 0.5
_AFTER_FAILURE_SECONDS = 1.0
_REMEMBERED = 50_000
_FIRST_BACKOFF = 0.1
_LAST_BACKOFF = 5.0

_RUNNING = (attempt_pb2.ATTEMPT_STATUS_PREPARING, attempt_pb2.ATTEMPT_STATUS_RUNNING)
_MODES = {
    rollout_pb2.ROLLOUT_MODE_TRAIN: "train",
    rollout_pb2.ROLLOUT_MODE_VAL: "val",
    rollout_pb2.ROLLOUT_MODE_TEST: "test",
}


@dataclass
class KnownAttempt:
    """What the store says of an attempt; `ended` says how it ended, empty while it runs."""

    ended: str = ""
    mode: str = ""
    resources: Mapping[str, ProxyLLM] = field(default_factory=dict)
    seed: str = ""
    seeded: int = 0

    def next_seed(self) -> dict[str, Any]:
        """The seed of the attempt's next call, where its rollout names one: another for each, in their order.

        Calls that an agent makes at once have it in the order in which they arrive.
        """
        if not self.seed:
            return {}
        self.seeded += 1
        return {"seed": seed_of(self.seed, self.seeded)}

    def sampling(self, model: str, mode: str) -> dict[str, Any]:
        """Sampling parameters of the resource for a model: its own, then those under the mode's name."""
        chosen = [llm for llm in self.resources.values() if llm.model == model] or [*self.resources.values()]
        if not chosen or (len(chosen) > 1 and chosen[0].model != model):
            return {}
        given = chosen[0].sampling_parameters
        flat = {name: value for name, value in given.items() if not isinstance(value, Mapping)}
        of_mode = given.get(mode)
        return flat | dict(of_mode) if isinstance(of_mode, Mapping) else flat


class Attempts:
    """Asks the store once for each attempt and follows its changes from there.

    The first call of an attempt waits for the answer, for at most half a second; while the store is away
    calls are let in unchecked, and asked for again.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = store_service_pb2_grpc.StoreServiceStub(channel)
        self._known: OrderedDict[str, KnownAttempt] = OrderedDict()
        self._asked: dict[str, asyncio.Task[KnownAttempt]] = {}
        self._credentials: OrderedDict[str, bool] = OrderedDict()
        self._sets: OrderedDict[tuple[str, int], Mapping[str, ProxyLLM]] = OrderedDict()
        self._failed = -_AFTER_FAILURE_SECONDS
        self._task = asyncio.create_task(self._follow())

    async def admit(self, attribution: Attribution) -> KnownAttempt | None:
        """The attempt, when it may call; None while the store cannot say.

        Raises Refusal for one that is over or unknown, and for a credential that is not good for it.
        """
        known = self._known.get(attribution.attempt_id)
        if self._must_ask(attribution):
            known = await self._look_up(attribution, known)
        self._check_running(attribution, known)
        return known

    def _must_ask(self, attribution: Attribution) -> bool:
        good = not _is_credential(attribution.credential) or attribution.credential in self._credentials
        unknown = attribution.attempt_id not in self._known or not good
        return unknown and time.monotonic() - self._failed > _AFTER_FAILURE_SECONDS

    @staticmethod
    def _check_running(attribution: Attribution, known: KnownAttempt | None) -> None:
        if known is not None and known.ended:
            raise Refusal(
                409,
                "attempt_ended",
                f"attempt {attribution.attempt_id} of rollout {attribution.rollout_id} is over "
                f"({known.ended}): its calls are not served any more; stop",
                # A record would bring back an attempt that is over because nothing was heard of it.
                recorded=known.ended != "unresponsive",
            )

    async def close(self) -> None:
        """Stop following."""
        tasks = {self._task, *self._asked.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_up(self, attribution: Attribution, known: KnownAttempt | None) -> KnownAttempt | None:
        key = attribution.attempt_id
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.create_task(self._ask(attribution, known))
            task.add_done_callback(lambda done: self._answered(key, done))
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                return await asyncio.shield(task)
        except TimeoutError:
            self._failed = time.monotonic()
        except grpc.aio.AioRpcError as error:
            self._failed = time.monotonic()
            logger.debug("attempt %s not looked up: %s", key, error.details())
        finally:
            del task  # it has the error, and the error's traceback has this frame
        return known

    def _answered(self, key: str, done: asyncio.Task[KnownAttempt]) -> None:
        self._asked.pop(key, None)
        if not done.cancelled():
            done.exception()  # whoever still waits is told; if nobody does, the next call asks again

    async def _ask(self, attribution: Attribution, known: KnownAttempt | None) -> KnownAttempt:
        if _is_credential(attribution.credential):
            await self._check_credential(attribution)
        if known is not None:
            return known
        try:
            attempt = (
                await self._stub.GetAttempt(
                    store_service_pb2.GetAttemptRequest(
                        rollout_id=attribution.rollout_id, attempt_id=attribution.attempt_id
                    ),
                    timeout=_LOOKUP_SECONDS,
                )
            ).attempt
            request = store_service_pb2.GetRolloutRequest(rollout_id=attribution.rollout_id)
            rollout = (await self._stub.GetRollout(request, timeout=_LOOKUP_SECONDS)).rollout.rollout
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                raise
            raise Refusal(
                404,
                "attempt_unknown",
                f"the store knows no attempt {attribution.attempt_id} of rollout {attribution.rollout_id}: "
                "check the base URL",
                recorded=False,
            ) from error
        found = self._remember(attempt)
        found.seed = next((each.value for each in rollout.labels if each.key == SEED_LABEL), "")
        found.mode = _MODES.get(rollout.mode, "")
        found.resources = await self._resources(
            attempt.resources_id or rollout.resources_id,
            attempt.resources_version or rollout.resources_version,
        )
        return found

    async def _check_credential(self, attribution: Attribution) -> None:
        """Only the store can check the signature: an empty write says whether the credential is good."""
        claimed = attribution_of_credential(attribution.credential)
        if claimed is None or (claimed.rollout_id, claimed.attempt_id) != (
            attribution.rollout_id,
            attribution.attempt_id,
        ):
            raise Refusal(
                403, "wrong_attempt", "the API key is the credential of another attempt", recorded=False
            )
        metadata = (("authorization", f"Bearer {attribution.credential}"),)
        request = store_service_pb2.AppendSpansRequest()
        try:
            await self._stub.AppendSpans(request, timeout=_LOOKUP_SECONDS, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise Refusal(
                    401, "invalid_api_key", f"the API key is refused: {error.details()}", recorded=False
                ) from error
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
        _keep(self._credentials, attribution.credential, True)

    async def _resources(self, resources_id: str, version: int) -> Mapping[str, ProxyLLM]:
        if not resources_id:
            return {}
        key = (resources_id, version)
        if key not in self._sets:
            request = store_service_pb2.GetResourcesRequest(resources_id=resources_id, version=version)
            answer = await self._stub.GetResources(request, timeout=_LOOKUP_SECONDS)
            _keep(self._sets, key, _proxies(answer.resources))
        return self._sets[key]

    def _remember(self, attempt: attempt_pb2.Attempt) -> KnownAttempt:
        known = self._known.get(attempt.attempt_id) or KnownAttempt()
        _keep(self._known, attempt.attempt_id, known)
        if attempt.status not in (*_RUNNING, attempt_pb2.ATTEMPT_STATUS_UNSPECIFIED):
            name = attempt_pb2.AttemptStatus.Name(attempt.status)
            known.ended = name.removeprefix("ATTEMPT_STATUS_").lower()
        else:
            # A plain dequeue's unresponsive attempt comes back to life with a span.
            known.ended = ""
        return known

    async def _follow(self) -> None:
        """Keep what is known up to date, across restarts of the store."""
        cursor, pause = 0, _FIRST_BACKOFF
        while True:
            request = store_service_pb2.WatchAttemptsRequest(run_id="*", cursor=cursor)
            try:
                async for answer in self._stub.WatchAttempts(request):
                    pause = _FIRST_BACKOFF
                    if not cursor:
                        self._known.clear()  # what happened before the watch began is not told
                    cursor = answer.cursor or cursor
                    for attempt in answer.attempts:
                        if attempt.attempt_id in self._known:
                            self._remember(attempt)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                    cursor = 0
                logger.debug("watch of attempts ended: %s", error.details())
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_BACKOFF)


def _is_credential(text: str) -> bool:
    return text.startswith("agl1.")


def _proxies(resources: resources_pb2.ResourceSet) -> Mapping[str, ProxyLLM]:
    found = {}
    for message in resources.resources:
        resource = resource_from_proto(message)
        if isinstance(resource, ProxyLLM):
            found[message.name] = resource
    return found


def _keep(book: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    book[key] = value
    book.move_to_end(key)
    with contextlib.suppress(KeyError):
        while len(book) > _REMEMBERED:
            book.popitem(last=False)

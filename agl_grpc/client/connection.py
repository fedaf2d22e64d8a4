"""The connection of a client: one channel on one event loop, idempotent calls, paged lists."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast, runtime_checkable

import grpc

from agl_grpc.client.channel import RetryPolicy, Tls, call_with_retries, open_channel, split_target
from agl_grpc.model.page import PaginatedResult
from agl_grpc.v1.runner_service_pb2_grpc import RunnerServiceStub
from agl_grpc.v1.store_service_pb2_grpc import StoreServiceStub
from agl_grpc.v1.trainer_service_pb2_grpc import TrainerServiceStub

if TYPE_CHECKING:  # these names exist in the stubs' types only
    from agl_grpc.v1.runner_service_pb2_grpc import RunnerServiceAsyncStub
    from agl_grpc.v1.store_service_pb2_grpc import StoreServiceAsyncStub
    from agl_grpc.v1.trainer_service_pb2_grpc import TrainerServiceAsyncStub

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)
T = TypeVar("T")

DEFAULT_TARGET = "127.0.0.1:4747"
_PAGE_SIZE = 1000


class UnaryMethod(Protocol[Request, Response]):
    """A unary method of a stub."""

    def __call__(
        self,
        request: Request,
        /,
        *,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> Awaitable[Response]: ...


@runtime_checkable
class ChannelSource(Protocol):
    """What a client may be given in place of an address: a store of the same process."""

    name: str
    """What messages call it."""

    def open_channel(self) -> grpc.aio.Channel:
        """A channel to it, on the running event loop."""
        ...


class _Bound:
    """A channel and its stubs, for as long as one event loop lives."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.loop = asyncio.get_running_loop()
        self.channel = channel
        self.store: StoreServiceAsyncStub = StoreServiceStub(self.channel)
        self.runner: RunnerServiceAsyncStub = RunnerServiceStub(self.channel)
        self.trainer: TrainerServiceAsyncStub = TrainerServiceStub(self.channel)


class Connection:
    """What every group of the client's methods stands on.

    ``target`` is the store's ``host:port``; ``run_id`` scopes whatever does not name a run itself;
    ``credential`` is sent as a bearer token. The channel opens at the first call and belongs to its loop.
    With TLS when the target begins with ``grpcs://`` or ``root_certificates`` names a PEM file of trusted
    issuers; ``certificate`` and ``key`` are the client's own, for a store that asks for them. A store of the
    same process (`agl_grpc.store.in_process.InProcessStore`) may stand in place of the address.
    """

    def __init__(
        self,
        target: str | ChannelSource = DEFAULT_TARGET,
        *,
        run_id: str = "default",
        credential: str | None = None,
        retry: RetryPolicy | None = None,
        root_certificates: Path | str | None = None,
        certificate: Path | str | None = None,
        key: Path | str | None = None,
    ) -> None:
        if (certificate is None) != (key is None):
            raise ValueError("certificate and key belong together: give both or neither")
        self._source = None if isinstance(target, str) else target
        address, secure = split_target(target if isinstance(target, str) else target.name)
        files = [None if file is None else Path(file) for file in (root_certificates, certificate, key)]
        self._tls = Tls(*files) if secure or any(files) else None
        self.target = address if self._tls is None else f"grpcs://{address}"
        self.run_id = run_id
        self.retry = retry or RetryPolicy()
        self._credential = credential
        self.metadata = (("authorization", f"Bearer {credential}"),) if credential else ()
        self._bound: _Bound | None = None

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[object, ...]]:
        if self._source is not None:
            raise TypeError("a client of an in-process store cannot leave its process")
        return _rebuild, (type(self), self.target, self.run_id, self._credential, self.retry, self._tls)

    def for_run(self, run_id: str) -> Self:
        """A client of the same store with the same settings, for another run; it opens its own channel."""
        made: Self = _rebuild(type(self), self.target, run_id, self._credential, self.retry, self._tls)
        made._source = self._source
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; a later call opens it again."""
        bound, self._bound = self._bound, None
        if bound is not None and not bound.loop.is_closed():
            await bound.channel.close()

    @property
    def bound(self) -> _Bound:
        """The channel and stubs of the running event loop.

        Raises `RuntimeError` when the client is in use on another loop: loops cannot share a channel.
        """
        loop = asyncio.get_running_loop()
        if self._bound is None or self._bound.loop.is_closed():
            source = self._source
            channel = source.open_channel() if source else open_channel(self.target, tls=self._tls)
            self._bound = _Bound(channel)
        elif self._bound.loop is not loop:
            raise RuntimeError(
                "this StoreClient belongs to another event loop; make one here or use SyncStoreClient"
            )
        return self._bound

    async def call(
        self,
        method: UnaryMethod[Request, Response],
        request: Request,
        *,
        try_timeout: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> Response:
        """Make one logical call: a request id is minted once and kept over all tries.

        ``try_timeout`` (seconds) bounds each try; the retry policy bounds all of them. Raises `StoreError`.
        """
        message = cast(Any, request)
        if "request_id" in message.DESCRIPTOR.fields_by_name and not message.request_id:
            message.request_id = uuid.uuid4().hex

        def attempt(left: float) -> Awaitable[Response]:
            seconds = left if try_timeout is None else min(left, try_timeout)
            return method(request, timeout=seconds, metadata=self.metadata)

        return await call_with_retries(attempt, retry or self.retry, self.target)

    async def query(
        self,
        method: UnaryMethod[Any, Response],
        request: Any,
        read: Callable[[Response], Iterable[T]],
        *,
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[T]:
        """Read a list page by page: ``limit`` items (-1 = all) after the first ``offset``, with the total."""
        if limit < -1 or offset < 0:
            raise ValueError(f"limit is {limit} and offset {offset}; limit must be >= -1 and offset >= 0")
        request.skip = offset
        request.include_total = limit >= 0 or offset > 0
        items: list[T] = []
        total: int | None = None
        while True:
            left = _PAGE_SIZE if limit < 0 else limit - len(items)
            request.page_size = max(1, min(_PAGE_SIZE, left))
            page = cast(Any, await self.call(method, request))
            total = page.total_size if page.HasField("total_size") else total
            items.extend(read(page))
            request.page_token = page.next_page_token
            if not request.page_token or 0 <= limit <= len(items):
                break
        kept = items if limit < 0 else items[:limit]
        return PaginatedResult(
            items=kept, limit=limit, offset=offset, total=len(items) if total is None else total
        )

    async def read_all(
        self, method: UnaryMethod[Any, Response], request: Any, read: Callable[[Response], Iterable[T]]
    ) -> list[T]:
        """Read a whole list page by page."""
        request.page_size = _PAGE_SIZE
        items: list[T] = []
        while True:
            page = cast(Any, await self.call(method, request))
            items.extend(read(page))
            request.page_token = page.next_page_token
            if not request.page_token:
                return items

    def run_or_default(self, run_id: str | None) -> str:
        """The run that a call names, else the client's own."""
        return self.run_id if run_id is None else run_id


def is_in_process(client: Connection) -> bool:
    """Whether a client's store lives in this process and has no address."""
    return client._source is not None


def _rebuild(
    kind: type[Connection],
    target: str,
    run_id: str,
    credential: str | None,
    retry: RetryPolicy,
    tls: Tls | None,
) -> Any:
    files = tls or Tls()
    return kind(
        target,
        run_id=run_id,
        credential=credential,
        retry=retry,
        root_certificates=files.root_certificates,
        certificate=files.certificate,
        key=files.key,
    )

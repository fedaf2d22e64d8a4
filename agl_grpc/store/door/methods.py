"""The contract's unary methods, called from another door of the same process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from agl_grpc.store import errors
from agl_grpc.store.door.call import Authenticator, Call
from agl_grpc.store.door.fields import check_request
from agl_grpc.store.door.service import Parser, parser_of, snake_case

Metadata = Sequence[tuple[str, str | bytes]]
"""What came along with a call: header names in lower case, and their values."""


class _Target(NamedTuple):
    """What serves a method: its name, a coroutine function, its answer's type, whether fields are checked."""

    name: str
    handler: Any
    response: Any
    checked: bool

    @classmethod
    def of(cls, method: MethodDescriptor, handlers: Sequence[object], checked: bool) -> _Target:
        """What serves a method; the handler is None when nothing does."""
        handler = next((t for h in handlers if (t := getattr(h, snake_case(method.name), None))), None)
        return cls(method.name, handler, message_factory.GetMessageClass(method.output_type), checked)


class Methods:
    """What the gRPC door serves, without the wire: same handlers, same checks, same callers.

    Args:
        services: Handler objects of each service.
        authenticator: Says who calls.
        parsers: Methods that take views of their requests, and check them by themselves.
        draining: Set when the server goes away.
    """

    def __init__(
        self,
        services: Mapping[ServiceDescriptor, Sequence[object]],
        authenticator: Authenticator,
        parsers: Mapping[str, Parser],
        draining: asyncio.Event,
    ) -> None:
        self.authenticator = authenticator
        self.draining = draining
        self._targets: dict[str, _Target] = {}
        self._streaming: dict[str, Any] = {}
        for service, handlers in services.items():
            for method in service.methods:
                if not method.client_streaming and not method.server_streaming:
                    checked = parser_of(method, parsers) is None
                    self._targets[method.input_type.name] = _Target.of(method, handlers, checked)
                else:
                    self._streaming[method.name] = _Target.of(method, handlers, checked=False).handler

    def call_of(self, method: str, metadata: Metadata, deadline: float | None = None) -> Call:
        """The call that a handler is told about.

        Raises:
            StoreError: UNAUTHENTICATED or NOT_PERMITTED.
        """
        return Call(self.authenticator.caller(method, metadata), method, deadline, self.draining)

    def streaming(self, method: str) -> Any:
        """What serves a streaming method; it takes the requests (or the request) and a call."""
        handler = self._streaming[method]
        if handler is None:
            raise errors.method_unimplemented(method)
        return handler

    async def __call__(self, request: Any, metadata: Metadata = (), deadline: float | None = None) -> Any:
        """Carries a request out; its type names the method.

        Args:
            request: The request, or a raw view of it.
            metadata: What came along with it.
            deadline: Moment on the monotonic clock by which the caller wants an answer; None = never.

        Returns:
            The response message.

        Raises:
            StoreError: As the method says.
        """
        target = self._targets[request.DESCRIPTOR.name.removeprefix("Raw")]
        call = self.call_of(target.name, metadata, deadline)
        if target.handler is None:
            raise errors.method_unimplemented(target.name)
        if target.checked:
            check_request(request)
        answer = await target.handler(request, call)
        return target.response.FromString(answer) if isinstance(answer, bytes) else answer

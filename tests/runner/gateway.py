"""A gateway in front of the store that permits some methods and not others, as authorising proxies do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Self

import grpc

from tests.support.store_process import RECONNECT


class Gateway(grpc.GenericRpcHandler):  # type: ignore[misc]  # the package has no types
    """Passes every call on to `target` but those of methods in `denied`."""

    def __init__(self, target: str, *denied: str) -> None:
        self.denied = set(denied)
        self.address = ""
        self._target = target

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._target, options=RECONNECT)
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._server.stop(None)
        await self._channel.close()

    def service(self, handler_call_details: Any) -> Any:
        """How any method is served: bytes in, bytes out."""
        return grpc.stream_stream_rpc_method_handler(partial(self._pass, handler_call_details.method))

    async def _pass(self, method: str, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        if method.rpartition("/")[2] in self.denied:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this gateway gives you no work")
        call = self._channel.stream_stream(method)(requests)
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details(), tuple(error.trailing_metadata()))
        finally:
            call.cancel()

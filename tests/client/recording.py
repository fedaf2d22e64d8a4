"""A gRPC server that records every unary call and answers as a test says: for what the wire carries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import Message

from agl_grpc.v1 import runner_service_pb2, store_service_pb2, trainer_service_pb2

_REQUESTS = {
    f"/{service.full_name}/{method.name}": (method.input_type, method.output_type)
    for file in (store_service_pb2, runner_service_pb2, trainer_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

Answer = Callable[[str, Message, grpc.aio.ServicerContext], Message | None]


@dataclass
class Recording:
    """What arrived, and where."""

    target: str = ""
    calls: list[tuple[str, Message]] = field(default_factory=list)


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, recording: Recording, answer: Answer | None) -> None:
        self._recording = recording
        self._answer = answer

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        path = details.method
        request_type, response_type = (descriptor._concrete_class for descriptor in _REQUESTS[path])

        async def handle(request: Message, context: grpc.aio.ServicerContext) -> Message:
            self._recording.calls.append((path, request))
            answer = self._answer(path, request, context) if self._answer else None
            if isinstance(answer, Failing):
                await context.abort(answer.code, answer.text)
            return response_type() if answer is None else answer

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=request_type.FromString, response_serializer=_serialize
        )


@dataclass
class Failing:
    """An answer that is an error."""

    code: grpc.StatusCode
    text: str = "told to fail"


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


@asynccontextmanager
async def recording_server(answer: Callable[..., object] | None = None) -> AsyncIterator[Recording]:
    """Serve every unary method of the contract; ``answer(path, request, context)`` may make the response."""
    recording = Recording()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Handler(recording, answer),))  # type: ignore[arg-type]  # answers vary
    recording.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield recording
    finally:
        await server.stop(0)

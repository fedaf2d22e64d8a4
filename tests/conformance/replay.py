"""Replays vectors with the Python client: `python -m tests.conformance.replay HOST:PORT [FOLDER]`."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from agl_grpc.client.errors import StoreError, error_from_rpc
from agl_grpc.v1 import runner_service_pb2, store_service_pb2, trainer_service_pb2

VECTORS = Path(__file__).parents[1] / "vectors"
TIMEOUT_SECONDS = 20.0
_PAUSE = threading.Event()
_SERVICES = (store_service_pb2, runner_service_pb2, trainer_service_pb2)


class Mismatch(AssertionError):
    """What was received is not what the vector expects."""


def vectors(folder: Path = VECTORS) -> list[Path]:
    """The vectors' files, in order."""
    return sorted(folder.glob("*.json"))


def replay(path: Path, channel: grpc.Channel, *, show: bool = False) -> None:
    """Replays one vector; `Mismatch` names the step. ``show`` prints what comes, to write vectors by."""
    kept = {"run": path.stem}
    for number, step in enumerate(json.loads(path.read_text())["steps"]):
        where = f"{path.stem}, step {number} ({step['rpc']})"
        step = _filled(step, kept)
        messages, error = _call(channel, step)
        received = [_plain(message) for message in messages]
        if show:
            print(where, json.dumps(received, indent=1), error)
        if "error" in step:
            if error is None:
                raise Mismatch(f"{where}: no error came, but {received}")
            found = {"code": error.code.value[0], "reason": error.reason, "info": error.metadata}
            _match(found, step["error"], f"{where}: error")
        elif error is not None:
            raise Mismatch(f"{where}: {error.reason or error.code}: {error}")
        else:
            _match(received, step.get("receive", []), where)
            for place, expected in step.get("bytes", {}).items():
                found_bytes = _message_at(messages, place).SerializeToString(deterministic=True).hex()
                _match(found_bytes, expected, f"{where}: the bytes of {place}")
        for name, place in step.get("keep", {}).items():
            kept[name] = _at(received, place)


def _call(channel: grpc.Channel, step: dict[str, Any]) -> tuple[list[Message], StoreError | None]:
    method = _method(step["rpc"])
    path = f"/{method.containing_service.full_name}/{method.name}"
    request, response = (message_factory.GetMessageClass(m) for m in (method.input_type, method.output_type))
    messages = [json_format.ParseDict(message, request()) for message in step["send"]]
    for place, fields in step.get("newer", {}).items():
        _message_at(messages, place).MergeFromString(bytes.fromhex(fields))
    received: list[Message] = []
    kind = (
        "stream" if method.client_streaming else "unary",
        "stream" if method.server_streaming else "unary",
    )
    make = getattr(channel, "_".join(kind))
    call = make(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString)
    outgoing: Any = iter(messages) if method.client_streaming else messages[0]
    try:
        if not method.server_streaming:
            return [call(outgoing, timeout=TIMEOUT_SECONDS)], None
        if method.client_streaming:
            outgoing = _in_step(messages, received)
        answers = call(outgoing, timeout=TIMEOUT_SECONDS)
        for answer in answers:
            received.append(answer)
            if step.get("until") == "cancel" and len(received) == len(step["receive"]):
                answers.cancel()
                break
    except grpc.RpcError as error:
        return received, error_from_rpc(error, "the store")  # type: ignore[arg-type]  # same face, other class
    return received, None


def _in_step(messages: list[Message], received: list[Message]) -> Iterator[Message]:
    """The next message once an answer to the one before has come; gRPC asks from a thread of its own."""
    for number, message in enumerate(messages):
        while len(received) < number:
            _PAUSE.wait(0.002)
        yield message


def _method(rpc: str) -> MethodDescriptor:
    service, name = rpc.split("/")
    pool = descriptor_pool.Default()
    return pool.FindServiceByName(f"agl_grpc.v1.{service}").methods_by_name[name]


def _message_at(messages: list[Message], place: str) -> Message:
    """The message at a place as ``0.groups.0.spans.1``: lists by index, fields by their names in JSON."""
    found: Any = messages
    for part in place.split("."):
        if part.isdigit():
            found = found[int(part)]
        else:
            names = {field.json_name: field.name for field in found.DESCRIPTOR.fields}
            found = getattr(found, names[part])
    assert isinstance(found, Message)
    return found


def _plain(message: Message) -> Any:
    return json_format.MessageToDict(message)


def _filled(value: Any, kept: dict[str, str]) -> Any:
    match value:
        case str():
            return re.sub(r"\$\{(\w+)\}", lambda name: kept[name[1]], value)
        case dict():
            return {key: _filled(item, kept) for key, item in value.items()}
        case list():
            return [_filled(item, kept) for item in value]
    return value


def _match(found: Any, expected: Any, where: str) -> None:
    match expected:
        case None:
            if found is not None:
                raise Mismatch(f"{where} is {found!r} and should not be set")
        case "*":
            if found is None:
                raise Mismatch(f"{where} is not set")
        case dict():
            for key, value in expected.items():
                _match(found.get(key) if isinstance(found, dict) else None, value, f"{where}.{key}")
        case list():
            size = len(found or [])
            if size != len(expected):
                raise Mismatch(f"{where} has {size} elements, not {len(expected)}: {found}")
            for index, value in enumerate(expected):
                _match(found[index], value, f"{where}.{index}")
        case _:
            if found != expected:
                raise Mismatch(f"{where} is {found!r}, not {expected!r}")


def _at(received: Any, place: str) -> str:
    for part in place.split("."):
        received = received[int(part)] if isinstance(received, list) else received[part]
    return str(received)


def main() -> int:
    """Replays all vectors; the number of those that failed."""
    target, *rest = sys.argv[1:]
    failed = 0
    with grpc.insecure_channel(target) as channel:
        for path in vectors(Path(rest[0]) if rest else VECTORS):
            try:
                replay(path, channel)
                print(f"ok {path.stem}")
            except Mismatch as error:
                failed += 1
                print(f"FAILED {path.stem}: {error}")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())

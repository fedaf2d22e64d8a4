"""Writes docs/contract.md from the contract's comments and the shared vectors: `make proto` runs it.

Reads a file descriptor set with source information from standard input (`buf build -o -`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2 as d

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "tests" / "vectors"
LONGEST_EXAMPLE = 600
_MESSAGE, _ENUM, _SERVICE, _FIELD, _NESTED_FIELD, _METHOD, _VALUE = 4, 5, 6, 2, 2, 2, 2
_SCALARS = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in d.FieldDescriptorProto.Type.items()
    if name not in ("TYPE_MESSAGE", "TYPE_ENUM", "TYPE_GROUP")
}

_INTRO = """# The contract

Generated from the comments in `proto/agl_grpc/v1/` and the vectors in `tests/vectors/`; `make proto` writes
it anew.

A running store answers server reflection, so no file is needed to call it:

```sh
grpcurl -plaintext 127.0.0.1:4747 list
grpcurl -plaintext -d '{"rolloutId": "ro-1"}' 127.0.0.1:4747 agl_grpc.v1.StoreService/GetRollout
buf curl --protocol grpc --http2-prior-knowledge -d '{}' http://127.0.0.1:4747/agl_grpc.v1.StoreService/GetServerInfo
```

**What is safe to repeat.** *Read*: always. *With its request id*: a repeat with the same `request_id` within
24 hours changes nothing and answers as the first did. *By key*: what is there already is counted, not stored
twice. *Stream*: open it again; it goes on from a cursor, from what is held, or from the last acknowledged
message. Tried again is what answers `UNAVAILABLE`, and `RESOURCE_EXHAUSTED` with a `RetryInfo`; nothing else.

**Errors** are a `google.rpc.Status` with one `google.rpc.ErrorInfo`, whose reasons are listed at
[ErrorReason](#errorreason). The reasons named with an rpc are those that the vectors show, not all there are.

**What may happen to a rollout, an attempt, a lease**: every state by every event stands in
[lifecycle.md](lifecycle.md).
"""


class Example(NamedTuple):
    """Calls of an rpc that vectors make."""

    request: str
    reasons: list[str]


class Comments:
    """Leading comments of one file, by the path of what they explain."""

    def __init__(self, file: d.FileDescriptorProto) -> None:
        self._texts = {tuple(at.path): at.leading_comments.strip() for at in file.source_code_info.location}

    def of(self, *path: int) -> str:
        """The comment, its lines joined."""
        return " ".join(line.strip() for line in self._texts.get(path, "").splitlines())


def examples() -> dict[str, Example]:
    """The shortest request of each rpc that succeeds, and the reasons of those that fail."""
    requests: dict[str, list[str]] = {}
    reasons: dict[str, set[str]] = {}
    for path in sorted(VECTORS.glob("*.json")):
        for step in json.loads(path.read_text())["steps"]:
            if "error" in step:
                reasons.setdefault(step["rpc"], set()).add(step["error"]["reason"])
            else:
                text = "\n".join(json.dumps(_readable(message)) for message in step["send"])
                requests.setdefault(step["rpc"], []).append(text)
    shown = {
        rpc: min((text for text in texts if text != "{}"), key=len, default="{}")
        for rpc, texts in requests.items()
    }
    return {rpc: Example(shown.get(rpc, ""), sorted(reasons.get(rpc, ()))) for rpc in {*requests, *reasons}}


def _readable(value: Any) -> Any:
    """Values kept by earlier steps of a vector as a reader would name them."""
    match value:
        case str():
            return value.replace("${", "").replace("}", "")
        case dict():
            return {key: _readable(item) for key, item in value.items()}
        case list():
            return [_readable(item) for item in value]
    return value


def repeat_class(service: str, method: d.MethodDescriptorProto, fields: set[str]) -> str:
    """How a call may be repeated."""
    if method.name == "PutBlob":
        return "by key"
    if method.client_streaming or method.server_streaming:
        return "stream"
    if "request_id" in fields:
        return "with its request id"
    if method.name in ("AppendSpans", "RenewLeases", "Heartbeat"):
        return "by key"
    if method.name == "IssueCredential":
        return "always; each answer is another credential"
    return "read"


def service_lines(file: d.FileDescriptorProto, known: dict[str, Example]) -> Iterator[str]:
    """A file's services, rpc by rpc."""
    comments = Comments(file)
    fields = {message.name: {field.name for field in message.field} for message in file.message_type}
    for number, service in enumerate(file.service):
        yield f"## {service.name}\n"
        yield f"{comments.of(_SERVICE, number)}\n"
        for index, method in enumerate(service.method):
            request, answer = (kind.rpartition(".")[2] for kind in (method.input_type, method.output_type))
            asks = f"{'stream of ' if method.client_streaming else ''}[{request}](#{request.lower()})"
            answers = f"{'stream of ' if method.server_streaming else ''}[{answer}](#{answer.lower()})"
            yield f"### {method.name}\n"
            yield f"{comments.of(_SERVICE, number, _METHOD, index)}\n"
            repeat = repeat_class(service.name, method, fields.get(request, set()))
            yield f"{asks} → {answers}. Repeat: {repeat}.\n"
            example = known.get(f"{service.name}/{method.name}")
            if example and example.reasons:
                yield f"Fails for example with {', '.join(f'`{reason}`' for reason in example.reasons)}.\n"
            if example and example.request and len(example.request) <= LONGEST_EXAMPLE:
                yield f"```json\n{example.request}\n```\n"


def message_lines(file: d.FileDescriptorProto) -> Iterator[str]:
    """A file's messages and enums."""
    comments = Comments(file)
    for number, message in enumerate(file.message_type):
        yield f"### {message.name}\n\n{comments.of(_MESSAGE, number)}\n"
        if message.field:
            yield "| field | type | meaning |\n|---|---|---|"
            for index, field in enumerate(message.field):
                meaning = comments.of(_MESSAGE, number, _NESTED_FIELD, index).replace("|", "\\|")
                yield f"| `{field.name}` = {field.number} | {_type(message, field)} | {meaning} |"
            yield ""
    for number, enum in enumerate(file.enum_type):
        yield f"### {enum.name}\n\n{comments.of(_ENUM, number)}\n"
        yield "| value | meaning |\n|---|---|"
        for index, value in enumerate(enum.value):
            meaning = comments.of(_ENUM, number, _VALUE, index).replace("|", "\\|")
            yield f"| `{value.name}` = {value.number} | {meaning} |"
        yield ""


def _type(message: d.DescriptorProto, field: d.FieldDescriptorProto) -> str:
    name = field.type_name.rpartition(".")[2]
    ours = field.type_name.startswith(".agl_grpc.")
    kind = f"[{name}](#{name.lower()})" if ours else name or _SCALARS[field.type]
    if field.label == d.FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    if field.proto3_optional:
        return f"optional {kind}"
    if field.HasField("oneof_index"):
        return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return kind


def main() -> None:
    """Writes the page."""
    files = d.FileDescriptorSet.FromString(sys.stdin.buffer.read()).file
    own = [file for file in files if file.package == "agl_grpc.v1"]
    known = examples()
    lines = [_INTRO]
    for file in own:
        lines.extend(service_lines(file, known))
    lines.append("## Messages and enums\n")
    for file in own:
        lines.extend(message_lines(file))
    (ROOT / "docs" / "contract.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()

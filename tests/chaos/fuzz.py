"""Random bytes and random well-formed messages into every method of the contract.

Inputs enter where the transport hands them over, and those of one method's turn are under way together: a
hundred thousand for each method are then a matter of an hour or two. A call may be carried out or refused.
It must never hit a defect (INTERNAL), and one that is refused must not write a row. At the end every
invariant of the database holds, and memory has not grown. What is sent follows from the seed, but for the
ids that the store mints and for which of two calls at one moment comes first.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import psutil
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from agl_grpc.store import limits
from agl_grpc.store.clock import ManualClock
from agl_grpc.store.door.call import Authenticator
from agl_grpc.store.door.credentials import CredentialSigner
from agl_grpc.store.door.service import ServiceBinder
from agl_grpc.store.handlers import handlers
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.store import Store
from agl_grpc.store.verify.check import check

_ENUMS = (-1, *range(12), 99)
_NUMBERS = (0, 1, 2, 3, 100, 1000, 10_001, -1, 2**31 - 1, -(2**31))
_LONG_NUMBERS = (*_NUMBERS, 2**53, 2**63 - 1, -(2**63))
_FLOATS = (0.0, 1.0, -1.5, float("nan"), float("inf"), 1e308)
_TEXTS = (
    *("", "default", "*", "latest", "a", "ü" * 40, "x" * 129, "y" * 5000, "nul\0", "a b/c", "ro-1", "at-1"),
)
_TAME_TEXTS = ("default", "a", "latest", "b")
_TAME_NUMBERS = (0, 1, 1, 2, 3, 100)
_PATHS = (
    *("input", "mode", "resources_id", "status", "config", "metadata", "labels", "priority", "worker_id"),
    *("last_heartbeat_time", "failure", "retention", "seal_timeout", "allow_self_grading", "colour"),
)
_ROUND = 200
"""Inputs of one method that are under way together, in one of their turns."""
_DEPTH = 4
_KNOWN_IDS = 64


Inputs = list[bytes]
"""What one call sends: one message, or those of a stream."""


def shown(inputs: Inputs) -> str:
    """For people, in hex."""
    return " | ".join(data.hex() for data in inputs)


def refused(inputs: Sequence[Inputs], codes: Sequence[grpc.StatusCode | None]) -> list[Inputs]:
    """Those that were not carried out."""
    return [one for one, code in zip(inputs, codes, strict=True) if code is not None]


class Refusal(Exception):
    """How the door ends a call: a status with its reason."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code


class _Context:
    """A call as the transport would show it."""

    def __init__(self, requests: list[bytes]) -> None:
        self._requests = requests
        self.answers = 0

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float:
        return 0.002  # long polls answer at once

    async def abort(self, code: grpc.StatusCode, message: str, trailing_metadata: object = ()) -> None:
        raise Refusal(code, message)

    async def read(self) -> Any:
        return self._requests.pop(0) if self._requests else grpc.aio.EOF

    async def write(self, answer: bytes) -> None:
        self.answers += 1


@dataclass
class _Details:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class Maker:
    """Makes inputs; remembers ids and tokens of answers, so that some inputs are about what exists."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._texts: dict[str, list[str]] = {}
        self._tame = False
        self._tokens: list[bytes] = []

    def noise(self) -> bytes:
        """Bytes of no meaning."""
        return self._chance.randbytes(self._chance.choice((0, 1, 2, 5, 20, 200)))

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        """A message that parses; half of them hold only values that may well be allowed."""
        if not depth:
            self._tame = self._chance.random() < 0.5
        made: Any = message_factory.GetMessageClass(descriptor)()
        for one in descriptor.fields:
            if self._chance.random() < (0.6 if depth < 2 else 0.3):
                self._fill(made, one, depth)
        return made  # type: ignore[no-any-return] # made by a class that is only known at run time

    def bent(self, data: bytes) -> bytes:
        """A message with a few bytes changed."""
        raw = bytearray(data)
        for _ in range(self._chance.randrange(1, 4)):
            if raw:
                raw[self._chance.randrange(len(raw))] = self._chance.randrange(256)
        return bytes(raw)

    def _fill(self, made: Any, one: FieldDescriptor, depth: int) -> None:
        value = getattr(made, one.name)
        repeated = hasattr(value, "extend")
        if one.message_type is not None:
            if depth >= _DEPTH:
                return
            for _ in range(self._chance.randrange(4) if repeated else 1):
                target = value.add() if repeated else value
                target.SetInParent()
                target.MergeFrom(self.message(one.message_type, depth + 1))
        elif repeated:
            value.extend(self._value(one) for _ in range(self._chance.randrange(4)))
        else:
            setattr(made, one.name, self._value(one))

    def _value(self, one: FieldDescriptor) -> Any:
        kind, choice = one.cpp_type, self._chance.choice
        if one.enum_type is not None:
            return choice(one.enum_type.values).number if self._tame else choice(_ENUMS)
        if one.type == FieldDescriptor.TYPE_BYTES:
            known = [choice(self._tokens)] if self._tokens else []
            return choice([b"", b"x", self._chance.randbytes(8), self._chance.randbytes(16), *known])
        if kind == FieldDescriptor.CPPTYPE_STRING:
            known = self._texts.get(one.name.removesuffix("s").removesuffix("_in"), [])
            if known and self._chance.random() < 0.7:
                return choice(known)
            if one.name == "paths":
                return choice(_PATHS)
            return choice(_TAME_TEXTS if self._tame else _TEXTS)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self._chance.random() < 0.5
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return choice(_FLOATS[: 5 if kind == FieldDescriptor.CPPTYPE_FLOAT else 6])
        if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
            return choice((0, 1, 7, 2**32 - 1))
        if self._tame:
            return choice(_TAME_NUMBERS)
        return choice(_LONG_NUMBERS if kind == FieldDescriptor.CPPTYPE_INT64 else _NUMBERS)

    def learn(self, answer: Message) -> None:
        """Remembers what an answer names."""
        for one, value in answer.ListFields():
            if one.message_type is not None:
                for part in list(value)[:3] if hasattr(value, "extend") else [value]:
                    if isinstance(part, Message):
                        self.learn(part)
            elif one.name == "lease_token":
                self._tokens = [*self._tokens[-_KNOWN_IDS:], value]
            elif isinstance(value, str) and value and one.name.endswith(("_id", "token", "digest", "cursor")):
                known = self._texts.setdefault(one.name.removeprefix("next_"), [])
                known.append(value)
                del known[:-_KNOWN_IDS]


@dataclass
class Result:
    """What came of it.

    Attributes:
        counts: Inputs by method and outcome: `done` or the status.
        defects: What must not happen, with the input in hex.
        grown_bytes: By how much the process grew after the first tenth.
        seconds: How long it took.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)
    grown_bytes: int = 0
    seconds: float = 0.0


class Fuzzer:
    """A store without a transport, and inputs for it."""

    def __init__(self, store: Store, side: WriteSide, seed: int) -> None:
        services, parsers = handlers(side, limits.QUEUE_BYTES)
        binder = ServiceBinder(Authenticator(side.moves.signer), asyncio.Event(), parsers)
        self._methods = [
            (method, binder.bind(service, objects).service(_Details(f"/{service.full_name}/{method.name}")))
            for service, objects in services.items()
            for method in service.methods
        ]
        self._store = store
        self._chance = random.Random(seed)
        self._maker = Maker(self._chance)
        path = store.database.path  # type: ignore[attr-defined] # an SQLite one
        self._watcher = sqlite3.connect(path, isolation_level=None)
        _count_changes(self._watcher)
        self.result = Result()

    async def run(
        self, count: int, say: Callable[[str], None] = lambda text: None, seconds: float = float("inf")
    ) -> Result:
        """`count` inputs for each method, in rounds, so that what one makes another one meets.

        Ends earlier, after a whole round, when it has taken so many seconds.
        """
        begun, memory = time.monotonic(), []
        rounds = -(-count // _ROUND)
        for turn in range(rounds):
            if time.monotonic() - begun > seconds:
                break
            for method, handler in self._methods:
                await self._some(method, handler, min(_ROUND, count - turn * _ROUND))
            await self._sweep()
            memory.append(psutil.Process().memory_info().rss)
            say(f"round {turn + 1} of {rounds}: {memory[-1] >> 20} MiB, {len(self.result.defects)} defects")
        report = await self._store.read(check)
        self.result.defects += [f"{broken.name}: {broken.rows[0]}" for broken in report.broken]
        self.result.grown_bytes = memory[-1] - memory[len(memory) // 10]
        self.result.seconds = time.monotonic() - begun
        self._watcher.close()
        return self.result

    async def _sweep(self) -> None:
        """Cancels and deletes all rollouts: those that are tried again would else become ever more."""
        everything = {"filter": {"run_id": "*"}}
        for method, handler in self._methods:
            if method.name in ("CancelRollouts", "DeleteRollouts"):
                request: Any = message_factory.GetMessageClass(method.input_type)(**everything)
                await handler.unary_unary(request.SerializeToString(), _Context([]))

    def _input(self, method: MethodDescriptor) -> bytes:
        way = self._chance.random()
        if way < 0.2:
            return self._maker.noise()
        data = self._maker.message(method.input_type).SerializeToString()
        return self._maker.bent(data) if way < 0.4 else data

    async def _some(self, method: MethodDescriptor, handler: Any, count: int) -> None:
        """So many inputs at once; looks for some that were refused and wrote if there was a write at all."""
        inputs = [self._inputs(method, handler) for _ in range(count)]
        before = self._version()
        codes = await self._at_once(method, handler, inputs)
        outcomes = self.result.counts.setdefault(method.name, Counter())
        outcomes.update("done" if code is None else code.name for code in codes)
        # In a stream what came before a bad message counts.
        if not handler.request_streaming and self._version() != before:
            for one in await self._writers(method, handler, refused(inputs, codes)):
                self._defect(f"{method.name} was refused and wrote a row: {shown(one)}")

    async def _writers(self, method: MethodDescriptor, handler: Any, inputs: list[Inputs]) -> list[Inputs]:
        """Which of these write although they are refused: all are sent again, until none is carried out."""
        if not inputs:
            return []
        before = self._version()
        left = refused(inputs, await self._at_once(method, handler, inputs))
        if self._version() == before:
            return []
        if len(left) < len(inputs):
            return await self._writers(method, handler, left)
        if len(left) == 1:
            return left
        half = len(left) // 2
        found = [await self._writers(method, handler, part) for part in (left[:half], left[half:])]
        # One that writes only in company is among them all.
        return found[0] + found[1] or left

    async def _at_once(
        self, method: MethodDescriptor, handler: Any, inputs: list[Inputs]
    ) -> list[grpc.StatusCode | None]:
        """Carries calls out; their codes, None for the ones that were not refused."""
        codes = await asyncio.gather(*(self._one(method, handler, one) for one in inputs))
        await self._store.write(lambda tx: None)  # what goes on beside the calls ends before the next
        return codes

    def _inputs(self, method: MethodDescriptor, handler: Any) -> Inputs:
        """What one call sends."""
        size = self._chance.randrange(1, 4) if handler.request_streaming else 1
        return [self._input(method) for _ in range(size)]

    async def _one(self, method: MethodDescriptor, handler: Any, inputs: Inputs) -> grpc.StatusCode | None:
        try:
            await self._call(method, handler, list(inputs))
        except Refusal as refusal:
            if refusal.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                self._defect(f"{method.name}: {refusal}: {shown(inputs)}")
            return refusal.code
        return None

    def _defect(self, what: str) -> None:
        """Notes it, and says it at once: a long run need not end for it to be looked into."""
        self.result.defects.append(what)
        print(what, file=sys.stderr, flush=True)

    async def _call(self, method: MethodDescriptor, handler: Any, inputs: list[bytes]) -> None:
        answer_type: Any = message_factory.GetMessageClass(method.output_type)
        if handler.request_streaming:
            context = _Context(inputs)
            serve = handler.stream_stream if handler.response_streaming else handler.stream_unary
            await serve(None, context)
        elif handler.response_streaming:
            answers = handler.unary_stream(inputs[0], _Context([]))
            try:
                # A watch goes on for ever: what it says first is enough.
                self._maker.learn(answer_type.FromString(await anext(answers)))
            except StopAsyncIteration:
                pass
            finally:
                await answers.aclose()
        else:
            self._maker.learn(answer_type.FromString(await handler.unary_unary(inputs[0], _Context([]))))

    def _version(self) -> int:
        """How many rows have been changed for good."""
        (version,) = self._watcher.execute("SELECT count FROM fuzz_changes").fetchone()
        return int(version)


def _count_changes(db: sqlite3.Connection) -> None:
    """Has the database count changed rows. Counters are left out: keys taken for nothing stay holes."""
    names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    db.execute("CREATE TABLE fuzz_changes (count INTEGER NOT NULL)")
    db.execute("INSERT INTO fuzz_changes VALUES (0)")
    for name in names:
        if name != "counters" and not name.startswith("sqlite_"):
            for event in ("INSERT", "UPDATE", "DELETE"):
                db.execute(
                    f"CREATE TRIGGER fuzz_{name}_{event} AFTER {event} ON {name} "
                    "BEGIN UPDATE fuzz_changes SET count = count + 1; END"
                )


@asynccontextmanager
async def fuzzer(seed: int) -> AsyncIterator[Fuzzer]:
    """A throw-away store to be fuzzed."""
    store = await Store.open(None, clock=ManualClock())
    try:
        side = await WriteSide.start(store, CredentialSigner(b"k" * 32))
        yield Fuzzer(store, side, seed)
    finally:
        await store.close()


async def garbage(address: str, seed: int, connections: int) -> None:
    """Connections that speak nonsense: bytes of no meaning, or HTTP/2's preface and frames of no meaning."""
    chance = random.Random(seed)
    host, _, port = address.rpartition(":")
    for number in range(connections):
        reader, writer = await asyncio.open_connection(host, int(port))
        if number % 2:
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            for _ in range(chance.randrange(1, 6)):
                body = chance.randbytes(chance.choice((0, 4, 8, 60)))
                head = struct.pack(">I", len(body))[1:] + bytes([chance.randrange(12), chance.randrange(256)])
                writer.write(head + struct.pack(">I", chance.choice((0, 1, 3, 2**31 - 1))) + body)
        else:
            writer.write(chance.randbytes(chance.choice((1, 24, 500))))
        try:
            await writer.drain()
            async with asyncio.timeout(0.02):
                await reader.read(4096)
        except (OSError, TimeoutError):
            pass  # it may hang up on us at any moment, or wait for more
        writer.close()

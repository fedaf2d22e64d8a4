"""Limits of fields: what the contract's comments state is what a server enforces, number by number.

The comments are read from the descriptor set, with the general rules that stand above StoreService. Every
field of every request gets values just within and just beyond; a limit that is enforced and not stated is
found too, since then a value within the general rules is refused. Times, enum values and NUL are the affair
of `tests/store/test_fields.py`, spans that of `tests/store/test_spans.py`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from agl_grpc.v1 import store_service_pb2 as store
from agl_grpc.v1 import trainer_service_pb2 as trainer
from tests.contract.test_evolution import BUF, ROOT
from tests.store.rig import Rig, reason, running
from tests.store.test_fields import OWN_RULES, path_of, unary_methods

_MESSAGE, _SERVICE, _FIELD = 4, 6, 2
_INTS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20}
_TIMES = {"s": 1, "h": 3600, "hours": 3600, "days": 86_400, "years": 31_557_600}
_NUMBER = r"(-?\d[\d ]*)"
_SIZE = re.compile(rf"(?:[Aa]t most|\d to) {_NUMBER} (bytes|KiB|MiB)")
_RANGE = re.compile(rf"(?:{_NUMBER} to|[Aa]t most) {_NUMBER}(?! ?(?:bytes|KiB|MiB|days|h\b|s\b))(?![\d ]*\d)")
_SPAN_OF_TIME = re.compile(rf"(?:{_NUMBER} (s) to|at most) {_NUMBER} (s|h|days|years)\b")
_LENIENT = 70 << 10
"""Bytes of a text that is cut and not refused."""
_MICROSECOND = 1000

_FIELDS_OF = {
    "runs": {"run_id"},
    "training runs": {"training_run_id"},
    "rollouts": {"rollout_id", "rollout_ids", "rollout_id_in"},
    "attempts": {"attempt_id", "attempt_ids"},
    "groups": {"group_id", "group_ids", "group_id_in"},
    "queues": {"queue", "queues", "queue_in"},
    "resources": {"resources_id"},
    "batches": {"batch_id", "batch_ids"},
    "requests": {"request_id"},
    "names": {"name", "reward_name"},
    "workers": {"worker_id", "worker_ids"},
    "sessions": {"session_id"},
    "trainers": {"trainer_id"},
    "engines": {"engine_id", "engine_ids"},
    "checkpoints": {"checkpoint_id"},
    "graders": {"grader"},
    "media types": {"media_type"},
}
"""Fields that the general rules mean by a word."""

_FORMATS = {"digest", "blob_digest", "order_by", "EngineState.engine_id"}
"""Texts that must have a form, or be that of another field: one of the largest size is not."""

_CLAMPED = {"page_size"}
"""Numbers above whose limit the limit is meant."""

_ITEMS: dict[str, Any] = {"retry_condition": 4}
"""An item that is allowed, for lists that do not take any."""


class Trial(NamedTuple):
    """A value of a field, and whether the contract allows it."""

    path: str
    request: Message
    allowed: bool


def _comments() -> tuple[dict[str, str], str]:
    """Comments by message and field, and the one of StoreService."""
    spec = importlib.util.spec_from_file_location("contract", ROOT / "docs" / "contract.py")
    assert spec is not None
    assert spec.loader is not None
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    command = [str(BUF), "build", str(ROOT / "proto"), "-o", "-", "--as-file-descriptor-set"]
    raw = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    found, rules = {}, ""
    for file in descriptor_pb2.FileDescriptorSet.FromString(raw).file:
        comments = contract.Comments(file)
        for number, message in enumerate(file.message_type):
            for index, field in enumerate(message.field):
                found[f"{message.name}.{field.name}"] = comments.of(_MESSAGE, number, _FIELD, index)
        for number, service in enumerate(file.service):
            if service.name == "StoreService":
                rules = comments.of(_SERVICE, number)
    return found, rules


def _whole(text: str) -> int:
    return int(text.replace(" ", ""))


class Stated:
    """What the contract says of each field."""

    def __init__(self) -> None:
        self._comments, self._rules = _comments()
        self._texts: dict[str, int] = {}
        general = re.search(r"at most 4 KiB: (.*?) (\d+) bytes; (.*?) (\d+) bytes\.", self._rules)
        assert general is not None, "the general rules for texts are gone"
        for words, most in ((general[1], general[2]), (general[3], general[4])):
            for word in re.split(r",? and |, ", words):
                self._texts |= dict.fromkeys(_FIELDS_OF[word.removeprefix("ids of ")], int(most))
        assert self._texts.keys() == {name for names in _FIELDS_OF.values() for name in names}
        self.items = self._general(rf"lists have at most {_NUMBER} items")
        self.labels = self._general(r"lists of labels (\d+)")
        self.tokens = self._general(r"Lease tokens have at most (\d+) bytes")
        self.years = self._general(rf"durations are not negative and at most {_NUMBER} years")

    def _general(self, pattern: str) -> int:
        found = re.search(pattern, self._rules)
        assert found is not None, f"the general rules no longer say: {pattern}"
        return _whole(found[1])

    def says(self, field: FieldDescriptor) -> str:
        """The field's comment."""
        return self._comments[f"{field.containing_type.name}.{field.name}"]

    def size(self, field: FieldDescriptor) -> int | None:
        """Most bytes; None = there is no limit but the message's."""
        said = _SIZE.search(self.says(field))
        if said is not None:
            return _whole(said[1]) * _UNITS[said[2]]
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.tokens if field.name == "lease_token" else None
        return None if "is cut at the" in self.says(field) else self._texts.get(field.name, 4 << 10)

    def count(self, field: FieldDescriptor) -> int:
        """Most items."""
        said = _RANGE.search(self.says(field))
        if said is not None:
            return _whole(said[2])
        return self.labels if field.name == "labels" else self.items

    def numbers(self, field: FieldDescriptor) -> tuple[int, int]:
        """Smallest and largest number."""
        largest = 2**31 - 1 if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else 2**63 - 1
        said = _RANGE.search(self.says(field))
        if said is None or field.name in _CLAMPED:
            return 0, largest
        return _whole(said[1] or "0"), _whole(said[2])

    def durations(self, field: FieldDescriptor) -> tuple[int, int]:
        """Shortest and longest time in nanoseconds."""
        said = self.says(field)
        least = _MICROSECOND if "longer than 0" in said else 0
        # Such a year is that of google.protobuf.Duration: ten thousand have 315,576,000,000 s.
        most = self.years * _TIMES["years"] * 10**9
        limit = _SPAN_OF_TIME.search(said)
        if limit is not None:
            least = _whole(limit[1]) * 10**9 if limit[1] else least
            most = _whole(limit[3]) * _TIMES[limit[4]] * 10**9
        return least, most


def _values(stated: Stated, field: FieldDescriptor) -> Iterator[tuple[Any, bool]]:
    """Values of a field, or of an item of it, each with whether it is allowed."""
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        yield from _sizes(field, stated.size(field))
    elif field.cpp_type in _INTS and field.enum_type is None:
        least, most = stated.numbers(field)
        yield from ((least, True), (most, True), (least - 1, False))
        if most < 2**31 - 1:
            yield most + 1, False
    elif field.message_type is not None and field.message_type.full_name == "google.protobuf.Duration":
        least, most = stated.durations(field)
        # Longer than the longest general one no Duration can hold in every language.
        for nanos, allowed in ((least, True), (most, True), (least - 1, False), (most + 10**9, False)):
            sign = -1 if nanos < 0 else 1
            yield {"seconds": sign * (abs(nanos) // 10**9), "nanos": sign * (abs(nanos) % 10**9)}, allowed


def _sizes(field: FieldDescriptor, most: int | None) -> Iterator[tuple[Any, bool]]:
    text = field.type == FieldDescriptor.TYPE_STRING
    if most is None:
        if text:
            yield "x" * _LENIENT, True
        return
    if _FORMATS.isdisjoint((field.name, f"{field.containing_type.name}.{field.name}")):
        yield "x" * most if text else b"x" * most, True
    # Bytes count, not characters.
    yield "ü" * (most // 2) + "x" if text else b"x" * (most + 1), False


def _list(stated: Stated, field: FieldDescriptor) -> Iterator[tuple[list[Any], bool]]:
    """Lists of a field, each with whether it is allowed."""
    for count, allowed in ((stated.count(field), True), (stated.count(field) + 1, False)):
        if field.name in _ITEMS:
            yield [_ITEMS[field.name]] * count, allowed
        elif field.message_type is not None and field.message_type.name == "Label":
            yield [{"key": str(number)} for number in range(count)], allowed
        elif field.message_type is not None:
            yield [{}] * count, allowed
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield [str(number) for number in range(count)], allowed
        else:
            yield [1] * count, allowed


def trials(stated: Stated, descriptor: Descriptor, seen: frozenset[str]) -> Iterator[Trial]:
    """Messages with one field set, also in the messages that they hold."""
    made: Any = message_factory.GetMessageClass(descriptor)
    for field in descriptor.fields:
        repeated, kind = field.is_repeated, field.message_type
        path = f"{field.name}[0]" if repeated else field.name
        if repeated:
            for items, allowed in _list(stated, field):
                yield Trial(field.name, made(**{field.name: items}), allowed)
        for value, allowed in _values(stated, field):
            needed = re.findall(r"needs (\w+)", stated.says(field))
            fields = {**dict.fromkeys(needed, "x"), field.name: [value] if repeated else value}
            yield Trial(path, made(**fields), allowed)
        if kind is not None and kind.full_name.startswith("agl_grpc.") and kind.full_name not in seen:
            for inner in trials(stated, kind, seen | {kind.full_name}):
                request = made(**{field.name: [inner.request] if repeated else inner.request})
                yield Trial(f"{path}.{inner.path}", request, inner.allowed)


async def _is_refused(rig: Rig, name: str, *, streams: bool, trial: Trial) -> bool:
    """Whether the server refuses a request because of this very field."""
    many = rig.channel.unary_stream if streams else rig.channel.unary_unary
    call: Any = many(name)(trial.request.SerializeToString(), timeout=20.0)
    try:
        await (call.read() if streams else call)
    except grpc.aio.AioRpcError as error:
        return reason(error) == "INVALID_FIELD" and path_of(error) == trial.path
    finally:
        call.cancel()
    return False


@pytest.mark.timeout(300)
async def test_every_stated_limit_is_enforced_and_every_enforced_one_is_stated() -> None:
    stated, wrong, tried = Stated(), list[str](), Counter[bool]()
    at_once = asyncio.Semaphore(8)

    async def check(rig: Rig, name: str, streams: bool, trial: Trial) -> None:
        async with at_once:
            refused = await _is_refused(rig, name, streams=streams, trial=trial)
        tried[trial.allowed] += 1
        if refused == trial.allowed:
            size = trial.request.ByteSize()
            wrong.append(f"{name} {trial.path} ({size} bytes): {'refused' if refused else 'not refused'}")

    async with running(None) as rig:
        for method in unary_methods():
            name = f"/{method.containing_service.full_name}/{method.name}"
            found = trials(stated, method.input_type, frozenset(OWN_RULES))
            await asyncio.gather(*(check(rig, name, method.server_streaming, trial) for trial in found))
    assert not wrong, "\n".join(wrong)
    assert min(tried.values()) > 500, tried


EMPTY: dict[str, tuple[Any, str]] = {
    "Resource.name": (
        store.PublishResourcesRequest(resources=[{"prompt_template": {}}]),
        "resources[0].name",
    ),
    "Label.key": (store.EnqueueRolloutsRequest(rollouts=[{"labels": [{}]}]), "rollouts[0].labels"),
    "Run.run_id": (store.CreateRunRequest(run={}), "run.run_id"),
    "PutRewardsRequest.rewards": (store.PutRewardsRequest(), "rewards"),
    "ListRewardsRequest.rollout_ids": (store.ListRewardsRequest(), "rollout_ids"),
    "DrainWorkersRequest.worker_ids": (store.DrainWorkersRequest(), "worker_ids"),
    "TrainingRun.algorithm": (trainer.CreateTrainingRunRequest(), "training_run.algorithm"),
    "Engine.engine_id": (trainer.ReportEngineStateRequest(), "engine.engine_id"),
    "PreparePolicyVersionRequest.model": (trainer.PreparePolicyVersionRequest(), "model"),
    "AcquireTrainingRunRequest.trainer_id": (
        trainer.AcquireTrainingRunRequest(training_run_id="t"),
        "trainer_id",
    ),
    "Metric.name": (
        trainer.ReportMetricsRequest(training_run_id="t", trainer_epoch=1, steps=[{"metrics": [{}]}]),
        "steps[0].metrics[0].name",
    ),
    "CommitBatchesRequest.checkpoint_id": (
        trainer.CommitBatchesRequest(training_run_id="t", trainer_epoch=1),
        "checkpoint_id",
    ),
    "ClaimBatchRequest.rollout_ids": (
        trainer.ClaimBatchRequest(training_run_id="t", trainer_epoch=1),
        "rollout_ids",
    ),
}
"""Of each field that the contract wants at least one byte or item of: a request without, and the path."""

NAN = float("nan")
NOT_FINITE: dict[str, tuple[Any, str]] = {
    "Reward.value": (
        store.PutRewardsRequest(rewards=[{"rollout_id": "r", "attempt_id": "latest", "value": NAN}]),
        "rewards[0].value",
    ),
    "RunGrader.weight": (
        store.CreateRunRequest(run={"run_id": "x", "graders": [{"name": "g", "weight": NAN}]}),
        "run.graders[0].weight",
    ),
    "RewardWeight.weight": (
        trainer.ClaimBatchRequest(
            training_run_id="t",
            trainer_epoch=1,
            rollout_ids=["r"],
            rules={"reward_weights": [{"name": "a", "weight": NAN}]},
        ),
        "rules",
    ),
    "SampleRules.discount": (
        trainer.ClaimBatchRequest(
            training_run_id="t", trainer_epoch=1, rollout_ids=["r"], rules={"discount": 1.5}
        ),
        "rules",
    ),
}
"""Of each floating-point number that the contract limits: a request that breaks the limit, and the path."""


def _fields(descriptor: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """All fields of a message and of those in it, each once."""
    if descriptor.full_name in seen or not descriptor.full_name.startswith("agl_grpc."):
        return
    seen.add(descriptor.full_name)
    for field in descriptor.fields:
        yield field
        if field.message_type is not None:
            yield from _fields(field.message_type, seen)


async def test_what_must_not_be_left_out_and_what_must_be_finite_is_refused() -> None:
    stated, seen = Stated(), set(OWN_RULES)
    fields = [field for method in unary_methods() for field in _fields(method.input_type, seen)]
    said = {f"{field.containing_type.name}.{field.name}": stated.says(field) for field in fields}
    assert {name for name, text in said.items() if re.search(r"(?<![-\d])1 to \d", text)} == EMPTY.keys()
    numbers = {name for name, text in said.items() if re.search(r"\bfinite|from 0 to 1\b", text)}
    assert numbers == NOT_FINITE.keys()
    async with running(None) as rig:
        await rig.enqueue(rollout_id="r")
        await rig.lease()
        await rig.trainer.CreateTrainingRun(
            trainer.CreateTrainingRunRequest(training_run={"training_run_id": "t", "algorithm": "verl"})
        )
        await rig.trainer.AcquireTrainingRun(
            trainer.AcquireTrainingRunRequest(training_run_id="t", trainer_id="me")
        )
        for name, (request, path) in {**EMPTY, **NOT_FINITE}.items():
            method = request.DESCRIPTOR.name.removesuffix("Request")
            stub = rig.trainer if hasattr(rig.trainer, method) else rig.store
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(request)
            assert (reason(caught.value), path_of(caught.value)) == ("INVALID_FIELD", path), name

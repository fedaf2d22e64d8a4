"""What a store holds after a replay, without what differs from store to store: minted ids and times."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from agl_grpc.model.raw import RawListSpansResponse, RawStoredSpan
from agl_grpc.v1 import store_service_pb2 as pb
from agl_grpc.v1 import store_service_pb2_grpc, trainer_service_pb2_grpc
from agl_grpc.v1 import trainer_service_pb2 as trainer

_VARIES = frozenset(
    {
        "createTime",
        "startTime",
        "endTime",
        "updateTime",
        "sealTime",
        "lastHeartbeatTime",
        "commitTime",
        "time",
    }
    # The hash of a batch covers the ids of its attempts, which are minted.
    | {"deadline", "lastSeenTime", "contentHash"}
)
_MINTED = re.compile(r"\b(ro|at|rs|ba)-[0-9a-f]{25}\b")


def stored_state(target: str) -> dict[str, Any]:
    """Runs with all they hold as texts (rollouts, rewards, resources, training runs, batches, policy
    versions, engines), and the SHA-256 of each span's stored bytes.

    Minted ids are replaced by one word.
    """
    with grpc.insecure_channel(target) as channel:
        stub = store_service_pb2_grpc.StoreServiceStub(channel)
        training = trainer_service_pb2_grpc.TrainerServiceStub(channel)
        state: dict[str, Any] = {}
        for run in stub.ListRuns(pb.ListRunsRequest(page_size=1000)).runs:
            chosen = pb.ListRolloutsRequest(order_by="create_time", page_size=1000, include_attempts=True)
            chosen.filter.run_id = run.run_id
            rollouts = list(stub.ListRollouts(chosen).rollouts)
            ids = [attempted.rollout.rollout_id for attempted in rollouts]
            resources = pb.ListResourcesRequest(run_id=run.run_id, all_versions=True, page_size=1000)
            state[run.run_id] = {
                "run": _plain(run),
                "rollouts": sorted(map(_text, map(_plain, rollouts))),
                "rewards": sorted(_text(_plain(one)) for one in _rewards(stub, ids)),
                "resources": sorted(_text(_plain(one)) for one in stub.ListResources(resources).resources),
                "spans": sorted(_text(list(_spans(channel, rollout_id))) for rollout_id in ids),
                "training": sorted(_text(_plain(one)) for one in _training(training, run.run_id)),
            }
        return state


def _rewards(stub: store_service_pb2_grpc.StoreServiceStub, ids: list[str]) -> Iterator[Message]:
    if ids:
        yield from stub.ListRewards(
            pb.ListRewardsRequest(rollout_ids=ids, all_revisions=True, page_size=1000)
        ).rewards


def _training(stub: trainer_service_pb2_grpc.TrainerServiceStub, run_id: str) -> Iterator[Message]:
    for training_run in stub.ListTrainingRuns(
        trainer.ListTrainingRunsRequest(run_id=run_id, page_size=1000)
    ).training_runs:
        yield training_run
        chosen = trainer.ListBatchesRequest(training_run_id=training_run.training_run_id, page_size=1000)
        yield from stub.ListBatches(chosen).batches
    versions = trainer.ListPolicyVersionsRequest(run_id=run_id, page_size=1000)
    yield from stub.ListPolicyVersions(versions).policy_versions
    yield from stub.ListEngines(trainer.ListEnginesRequest(run_id=run_id, page_size=1000)).engines


def _spans(channel: grpc.Channel, rollout_id: str) -> Iterator[tuple[int, str]]:
    call = channel.unary_unary(
        "/agl_grpc.v1.StoreService/ListSpans",
        request_serializer=pb.ListSpansRequest.SerializeToString,
        response_deserializer=RawListSpansResponse.FromString,
    )
    stored: RawStoredSpan
    for stored in call(pb.ListSpansRequest(rollout_id=rollout_id, page_size=1000)).spans:
        yield stored.sequence_id, hashlib.sha256(stored.span).hexdigest()


def _plain(message: Message) -> Any:
    return _without_times(json_format.MessageToDict(message))


def _without_times(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_times(item) for key, item in value.items() if key not in _VARIES}
        case list():
            return [_without_times(item) for item in value]
    return value


def _text(value: Any) -> str:
    return _MINTED.sub(r"\1-minted", repr(value))

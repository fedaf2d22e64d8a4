"""Which objects serve which service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.descriptor import ServiceDescriptor

from agl_grpc.model import raw
from agl_grpc.store.blobs import forget_refs
from agl_grpc.store.blobs import prune as prune_blobs
from agl_grpc.store.door.info import InfoHandlers
from agl_grpc.store.door.service import Parser
from agl_grpc.store.handlers.attempts import AttemptHandlers
from agl_grpc.store.handlers.batches import BatchHandlers
from agl_grpc.store.handlers.blobs import BlobHandlers
from agl_grpc.store.handlers.credentials import CredentialHandlers
from agl_grpc.store.handlers.lease_stream import LeaseStreamHandlers
from agl_grpc.store.handlers.policies import PolicyHandlers
from agl_grpc.store.handlers.resources import ResourceHandlers
from agl_grpc.store.handlers.rewards import RewardHandlers
from agl_grpc.store.handlers.rollouts import RolloutHandlers
from agl_grpc.store.handlers.runner import RunnerHandlers
from agl_grpc.store.handlers.runs import RunHandlers
from agl_grpc.store.handlers.samples import SampleHandlers
from agl_grpc.store.handlers.span_reads import SpanReadHandlers
from agl_grpc.store.handlers.span_writes import SpanWriteHandlers
from agl_grpc.store.handlers.training import TrainingHandlers
from agl_grpc.store.handlers.watches import WatchHandlers
from agl_grpc.store.handlers.workers import WorkerHandlers
from agl_grpc.store.otlp.handlers import OTLP_PARSERS, otlp_services
from agl_grpc.store.rewards import forget_rewards
from agl_grpc.store.rollouts.write_side import WriteSide
from agl_grpc.store.spans.evict import EvictionLimits, Evictor
from agl_grpc.store.spans.stream import prune_producers
from agl_grpc.store.spans.write import forget_spans
from agl_grpc.store.training.batches import pins
from agl_grpc.store.training.policies import next_deadline
from agl_grpc.store.training.policies import sweep as abort_overdue
from agl_grpc.v1 import runner_service_pb2, store_service_pb2, trainer_service_pb2

_STORE = store_service_pb2.DESCRIPTOR.services_by_name["StoreService"]
_RUNNER = runner_service_pb2.DESCRIPTOR.services_by_name["RunnerService"]
_TRAINER = trainer_service_pb2.DESCRIPTOR.services_by_name["TrainerService"]


def handlers(
    side: WriteSide, span_queue_bytes: int, eviction: EvictionLimits | None = None
) -> tuple[Mapping[ServiceDescriptor, Sequence[object]], Mapping[str, Parser]]:
    """The handler objects of each service, and the parsers that replace generated request types.

    Args:
        side: What they serve.
        span_queue_bytes: Most bytes of spans that wait for the disk.
        eviction: When a throw-away store gives spans up; None = never.
    """
    evictor = None if eviction is None else Evictor(side.store, eviction, side.deletion.is_pinned)
    if evictor is not None:
        side.store.on_close.append(evictor.close)
    span_writes = SpanWriteHandlers(side.store, span_queue_bytes, evictor)
    services: dict[ServiceDescriptor, Sequence[object]] = {
        _STORE: [
            InfoHandlers(side.store),
            RunHandlers(side),
            RolloutHandlers(side),
            AttemptHandlers(side),
            WorkerHandlers(side, eviction),
            WatchHandlers(side),
            span_writes,
            SpanReadHandlers(side.store),
            RewardHandlers(side.store),
            CredentialHandlers(side.store, side.signer),
            ResourceHandlers(side),
            BlobHandlers(side.store),
        ],
        _RUNNER: [RunnerHandlers(side, evictor), LeaseStreamHandlers(side)],
        _TRAINER: [
            TrainingHandlers(side),
            BatchHandlers(side),
            SampleHandlers(side.store),
            PolicyHandlers(side),
        ],
        **otlp_services(span_writes.append_spans),
    }
    parsers: dict[str, Parser] = {
        "AppendSpans": raw.RawAppendSpansRequest.FromString,
        "StreamSpans": raw.RawStreamSpansRequest.FromString,
        "CompleteAttempts": raw.RawCompleteAttemptsRequest.FromString,
        **OTLP_PARSERS,
    }
    side.store.maintenance.register(prune_producers)
    side.store.maintenance.register(prune_blobs)
    side.store.timers.register(abort_overdue, next_deadline)
    # What came due while no server ran.
    side.store.timers.arm(side.store.clock.now())
    side.deletion.is_pinned.append(pins)
    side.deletion.on_delete += [forget_spans, forget_rewards, forget_refs]
    return services, parsers

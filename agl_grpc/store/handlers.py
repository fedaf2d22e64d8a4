"""Which objects serve which service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.descriptor import ServiceDescriptor

from agl_grpc.store.credentials import CredentialSigner
from agl_grpc.store.info import InfoHandlers
from agl_grpc.store.service import Parser
from agl_grpc.store.store import Store
from agl_grpc.v1 import runner_service_pb2, store_service_pb2, trainer_service_pb2

_STORE = store_service_pb2.DESCRIPTOR.services_by_name["StoreService"]
_RUNNER = runner_service_pb2.DESCRIPTOR.services_by_name["RunnerService"]
_TRAINER = trainer_service_pb2.DESCRIPTOR.services_by_name["TrainerService"]


def handlers(
    store: Store, signer: CredentialSigner
) -> tuple[Mapping[ServiceDescriptor, Sequence[object]], Mapping[str, Parser]]:
    """The handler objects of each service, and the parsers that replace generated request types.

    Args:
        store: What they serve.
        signer: Mints attempt credentials.
    """
    services: dict[ServiceDescriptor, list[object]] = {
        _STORE: [InfoHandlers(store)],
        _RUNNER: [],
        _TRAINER: [],
    }
    parsers: dict[str, Parser] = {}
    return services, parsers

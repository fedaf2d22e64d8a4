"""How clients connect, and how often they try again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from agl_grpc.client.errors import MAX_MESSAGE_BYTES, error_from_rpc, retry_after

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted store is found again quickly: gRPC's own default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt to connect may take: a busy store or a far one needs its time.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

# CANCELLED that the caller did not ask for is a server going away in mid-call.
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

BROKEN_WRITE = "Internal error from Core"
"""What gRPC itself says, as INTERNAL, when a stream ends under a write; the store's own status is lost."""

_PLAIN = ("grpc://", "http://")
_SECURE = ("grpcs://", "https://")

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Tls:
    """What a client needs for a store that serves with TLS.

    ``root_certificates`` is a PEM file with the issuers that the client trusts; ``None`` = the file that
    ``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`` names, else those that come with gRPC. ``certificate`` and ``key``
    are PEM files too, for a store that asks its clients for a certificate.
    """

    root_certificates: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises `OSError` for one that cannot be read."""
        files = (self.root_certificates, self.key, self.certificate)
        return grpc.ssl_channel_credentials(*(None if file is None else file.read_bytes() for file in files))


def split_target(target: str) -> tuple[str, bool]:
    """``host:port`` of a target, and whether its scheme (``grpcs://``, ``https://``) asks for TLS."""
    for scheme in (*_PLAIN, *_SECURE):
        if target.startswith(scheme):
            return target.removeprefix(scheme).rstrip("/"), scheme in _SECURE
    return target.rstrip("/"), False


def open_channel(
    target: str, options: Sequence[tuple[str, int]] = OPTIONS, tls: Tls | None = None
) -> grpc.aio.Channel:
    """A channel to a store: with TLS if the target's scheme is ``grpcs://`` or ``tls`` is given."""
    address, secure = split_target(target)
    if secure or tls is not None:
        return grpc.aio.secure_channel(address, (tls or Tls()).credentials(), options=options)
    return grpc.aio.insecure_channel(address, options=options)


def open_blocking_channel(target: str) -> grpc.Channel:
    """As ``open_channel``, for threads without an event loop."""
    address, secure = split_target(target)
    if secure:
        return grpc.secure_channel(address, Tls().credentials(), options=OPTIONS)
    return grpc.insecure_channel(address, options=OPTIONS)


@dataclass(slots=True, frozen=True, kw_only=True)
class RetryPolicy:
    """How long and how often a call is tried again. All in seconds.

    ``timeout`` bounds one logical call with all its tries; waits start at ``first_wait`` and double up to
    ``longest_wait``, each shortened at random so that a fleet of clients does not come back in step.
    """

    timeout: float = 120.0
    first_wait: float = 0.05
    longest_wait: float = 2.0

    def wait(self, tries: int) -> float:
        """How long to wait after so many failed tries."""
        return float(min(self.longest_wait, self.first_wait * 2 ** min(tries, 16)) * random.uniform(0.5, 1.0))


def is_transient(error: grpc.aio.AioRpcError) -> bool:
    """Whether trying again may help: UNAVAILABLE, a broken stream, RESOURCE_EXHAUSTED with a time to wait."""
    if error.code() in _TRANSIENT:
        return True
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == BROKEN_WRITE:
        return True
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after(error) is not None


async def call_with_retries(attempt: Callable[[float], Awaitable[T]], policy: RetryPolicy, target: str) -> T:
    """Call ``attempt(seconds_left)`` until it succeeds, fails for good, or the policy's time is over.

    Raises the typed exception of the last failure.
    """
    deadline = time.monotonic() + policy.timeout
    tries = 0
    while True:
        try:
            return await attempt(max(0.001, deadline - time.monotonic()))
        except grpc.aio.AioRpcError as error:
            wait = retry_after(error) or policy.wait(tries)
            if not is_transient(error) or time.monotonic() + wait >= deadline:
                raise error_from_rpc(error, target) from None
            tries += 1
            await asyncio.sleep(wait)

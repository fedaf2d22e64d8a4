"""Rendezvous store and process group, created without touching torch's global default group."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from agl_grpc.weights.wire import TransferError, group_prefix

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, TCPStore

_WAIT_SLICE = 0.2
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.005


class Deadline:
    """A moment on the monotonic clock after which a transfer gives up; `cancel` makes it come at once."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._cancelled = ""

    def cancel(self, reason: str) -> None:
        """End every wait on this deadline with `reason`. Safe from any thread."""
        self._cancelled = self._cancelled or reason

    def remaining(self, what: str) -> float:
        """Seconds left. Raises TransferError naming `what` was waited for when none are left."""
        if self._cancelled:
            raise TransferError(f"given up while waiting for {what}: {self._cancelled}")
        left = self._until - time.monotonic()
        if left <= 0:
            raise TransferError(f"deadline passed while waiting for {what}")
        return left


def listen(host: str, port: int) -> TCPStore:
    """Start a rendezvous store that listens on `host` only (`port` 0 picks a free one)."""
    from torch.distributed import TCPStore

    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        bound = listener.getsockname()[1]
        # The store takes over (and closes) the descriptor: give it a duplicate that outlives this block.
        return TCPStore(
            host,
            bound,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            master_listen_fd=socket.dup(listener.fileno()),
            use_libuv=True,
        )


def connect(host: str, port: int, deadline: Deadline) -> TCPStore:
    """Connect to a sender's rendezvous store."""
    from torch.distributed import TCPStore

    limit = min(deadline.remaining("the sender's rendezvous store"), 30.0)
    try:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit))
    except RuntimeError as error:
        raise TransferError(f"cannot reach the sender at {host}:{port}: {_first_line(error)}") from error


def wait_key(store: TCPStore, key: str, deadline: Deadline, what: str) -> bytes:
    """Value of `key`, waiting for it until the deadline, in slices so that a cancelled wait ends soon."""
    from torch.distributed import DistNetworkError, DistStoreError

    while True:
        limit = min(deadline.remaining(what), _WAIT_SLICE)
        try:
            store.wait([key], timedelta(seconds=limit))
        except DistNetworkError as error:
            raise TransferError(f"lost the sender while waiting for {what}: {_first_line(error)}") from error
        except DistStoreError:
            continue
        return bytes(store.get(key))


def wait_until(condition: Callable[[], bool], deadline: Deadline, what: str) -> None:
    """Return when `condition` holds; look again and again (a torch store has no wait for counters)."""
    pause = _SHORTEST_PAUSE
    while not condition():
        time.sleep(min(deadline.remaining(what), pause))
        # What is nearly there is seen at once; what takes long is not asked for often.
        pause = min(1.5 * pause, _LONGEST_PAUSE)


def create_group(
    store: TCPStore, group: int, rank: int, size: int, backend: str, deadline: Deadline
) -> ProcessGroup:
    """Join process group number `group` as `rank` of `size`, over ``gloo`` or ``nccl``."""
    from torch.distributed import PrefixStore, ProcessGroupGloo

    prefixed = PrefixStore(group_prefix(group), store)
    limit = timedelta(seconds=deadline.remaining("the process group"))
    try:
        if backend == "gloo":
            options = ProcessGroupGloo._Options()
            options._timeout = limit
            options._devices = [
                ProcessGroupGloo.create_device(hostname=_local_address(store.host, store.port))
            ]
            return ProcessGroupGloo(prefixed, rank, size, options)
        if backend == "nccl":
            from torch.distributed import ProcessGroupNCCL

            nccl_options = ProcessGroupNCCL.Options()
            nccl_options._timeout = limit
            return ProcessGroupNCCL(prefixed, rank, size, nccl_options)
    except RuntimeError as error:
        raise TransferError(f"cannot form the {backend} group of {size}: {_first_line(error)}") from error
    raise TransferError(f"unknown backend {backend!r}: use gloo or nccl")


def broadcast(group: ProcessGroup, tensor: torch.Tensor, deadline: Deadline) -> None:
    """Broadcast a flat tensor from rank 0 and wait for it."""
    limit = timedelta(seconds=deadline.remaining("a bucket"))
    try:
        group.broadcast(tensor, 0).wait(limit)
    except RuntimeError as error:
        raise TransferError(f"broadcast failed: {_first_line(error)}") from error


def discard(group: ProcessGroup | None) -> None:
    """Give up a process group that may have a broken member."""
    if group is not None:
        with contextlib.suppress(RuntimeError):
            group.abort()


def supported_backends() -> tuple[str, ...]:
    """Backends that this process can speak, best first."""
    import torch

    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        return ("nccl", "gloo")
    return ("gloo",)


def _local_address(host: str, port: int) -> str:
    """The local address from which `host` is reached: gloo must not guess an interface by the host's name."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__

"""The learner's half: rank 0 of the transfer group, which packs tensors into segments and broadcasts them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from agl_grpc.weights import group as groups
from agl_grpc.weights import wire
from agl_grpc.weights.digest import combined_digest, dtype_name, segment_digests

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, TCPStore


class WeightSender:
    """Sends whole sets of weights to engines, one transfer at a time.

    The rendezvous store listens on `host` (`port` 0: a free one) for the sender's life; the process group is
    kept between transfers while its members stay the same and nothing failed. `bucket_bytes` bounds one
    broadcast. `backend` is ``auto`` (NCCL where every member has it, else gloo), ``gloo`` or ``nccl``.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        bucket_bytes: int = wire.DEFAULT_BUCKET_BYTES,
        backend: str = "auto",
    ) -> None:
        if not 0 < bucket_bytes <= wire.DEFAULT_BUCKET_BYTES:
            raise ValueError(f"bucket_bytes must be in 1..{wire.DEFAULT_BUCKET_BYTES}, not {bucket_bytes}")
        self._store: TCPStore = groups.listen(host, port)
        self._host = host
        self._bucket_bytes = bucket_bytes
        self._backend = backend
        self._group: ProcessGroup | None = None
        self._group_number = 0
        self._members: dict[str, int] = {}
        self._deadline: groups.Deadline | None = None

    @property
    def endpoint(self) -> str:
        """Where receivers find this sender: ``host:port``."""
        return f"{self._host}:{self._store.port}"

    def send(
        self,
        transfer_id: str,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        receivers: int,
        timeout: float,
    ) -> wire.TransferReport:
        """Send `tensors` (checkpoint names, any device, any dtype) to `receivers` worker processes.

        Blocks until every receiver has taken everything. `transfer_id` must be new. Raises TransferError when
        a receiver is missing, breaks, or `timeout` seconds have passed; nothing is loaded anywhere then.
        """
        if receivers < 1:
            raise ValueError("receivers must be at least 1")
        started = time.monotonic()
        self._deadline = deadline = groups.Deadline(timeout)
        try:
            backend = self._gather(transfer_id, receivers, deadline)
            digests, sent = self._send_segments(transfer_id, tensors, backend, deadline)
            self._store.set(wire.digests_key(transfer_id), json.dumps(digests))
            self._await_count(wire.done_counter(transfer_id), receivers, deadline, "receivers to finish")
        except BaseException:
            self._drop_group()
            raise
        seconds = time.monotonic() - started
        return wire.TransferReport(transfer_id, combined_digest(digests), sent, len(digests), seconds)

    def cancel(self, reason: str) -> None:
        """End a `send` that runs in another thread; it raises TransferError with `reason`."""
        if self._deadline is not None:
            self._deadline.cancel(reason)

    def close(self) -> None:
        """Leave the process group. The rendezvous store ends with this object."""
        self._drop_group()

    def _gather(self, transfer_id: str, receivers: int, deadline: groups.Deadline) -> str:
        """Wait for all receivers, decide on group and backend, publish the plan and join the group."""
        self._await_count(
            wire.join_counter(transfer_id), receivers, deadline, f"{receivers} receivers to join"
        )
        joins = [
            wire.JoinRequest.decode(
                groups.wait_key(self._store, wire.join_key(transfer_id, i), deadline, "a receiver's hello")
            )
            for i in range(1, receivers + 1)
        ]
        backend = self._choose_backend(joins)
        ids = {join.receiver_id for join in joins}
        if len(ids) != receivers:
            raise wire.TransferError(f"two receivers joined under one name: {sorted(ids)}")
        keep = (
            self._group is not None
            and ids == set(self._members)
            and all(j.group == self._group_number for j in joins)
        )
        if not keep:
            self._drop_group()
            self._group_number += 1
            self._members = {name: rank for rank, name in enumerate(sorted(ids), start=1)}
        plan = wire.Plan(self._group_number, backend, self._bucket_bytes, self._members)
        self._store.set(wire.plan_key(transfer_id), plan.encode())
        if self._group is None:
            self._group = groups.create_group(
                self._store, self._group_number, 0, receivers + 1, backend, deadline
            )
        return backend

    def _choose_backend(self, joins: list[wire.JoinRequest]) -> str:
        mine = groups.supported_backends() if self._backend == "auto" else (self._backend,)
        for backend in mine:
            if all(backend in join.backends for join in joins):
                return backend
        raise wire.TransferError(
            f"no common backend: sender has {mine}, receivers have {[j.backends for j in joins]}"
        )

    def _send_segments(
        self,
        transfer_id: str,
        tensors: Iterable[tuple[str, torch.Tensor]],
        backend: str,
        deadline: groups.Deadline,
    ) -> tuple[list[str], int]:
        digests: list[str] = []
        sent = 0
        index = 0
        with ThreadPoolExecutor(1, thread_name_prefix="agl-weight-digest") as hasher:
            pending: Future[list[str]] | None = None
            for header, memory in pack_segments(tensors, self._bucket_bytes):
                # The previous segment's digest is awaited first: at most two segments are in memory.
                if pending is not None:
                    digests += pending.result()
                pending = hasher.submit(segment_digests, memory, header.entries)
                self._store.set(wire.segment_key(transfer_id, index), header.encode())
                self._broadcast(memory, backend, deadline)
                sent += sum(entry.nbytes for entry in header.entries)
                index += 1
            if pending is not None:
                digests += pending.result()
        end = wire.SegmentHeader((), 0)
        self._store.set(wire.segment_key(transfer_id, index), end.encode())
        return digests, sent

    def _broadcast(self, memory: torch.Tensor, backend: str, deadline: groups.Deadline) -> None:
        assert self._group is not None
        for start in range(0, memory.numel(), self._bucket_bytes):
            part = memory[start : start + self._bucket_bytes]
            groups.broadcast(self._group, part.cuda() if backend == "nccl" else part, deadline)

    def _await_count(self, key: str, count: int, deadline: groups.Deadline, what: str) -> None:
        groups.wait_until(lambda: self._store.add(key, 0) >= count, deadline, what)

    def _drop_group(self) -> None:
        groups.discard(self._group)
        self._group = None
        self._members = {}


def pack_segments(
    tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> Iterator[tuple[wire.SegmentHeader, torch.Tensor]]:
    """Pack tensors in order into host memory of at most `bucket_bytes` (a larger tensor: one alone)."""
    waiting: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        needed = _aligned(tensor.numel() * tensor.element_size())
        if waiting and size + needed > bucket_bytes:
            yield _pack(waiting, size)
            waiting, size = [], 0
        waiting.append((name, tensor))
        size += needed
    if waiting:
        yield _pack(waiting, size)


def _pack(tensors: list[tuple[str, torch.Tensor]], size: int) -> tuple[wire.SegmentHeader, torch.Tensor]:
    import torch

    memory = torch.zeros(size, dtype=torch.uint8)
    entries = []
    offset = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        memory[offset : offset + nbytes].copy_(flat)
        entries.append(wire.TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape), offset, nbytes))
        offset += _aligned(nbytes)
    return wire.SegmentHeader(tuple(entries), size), memory


def _aligned(nbytes: int) -> int:
    return -(-nbytes // wire.ALIGNMENT) * wire.ALIGNMENT

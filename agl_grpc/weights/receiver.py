"""The engine's half: a thread that takes a transfer into staging memory while the engine goes on serving."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from agl_grpc.weights import group as groups
from agl_grpc.weights import wire
from agl_grpc.weights.digest import combined_digest, segment_digests
from agl_grpc.weights.kept import forget, forget_others, keep, take_back
from agl_grpc.weights.wire import ReceiverState, ReceiverStatus, TransferError

logger = logging.getLogger("agl_grpc.weights")

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, TCPStore


class WeightReceiver:
    """Receives one transfer at a time into host memory, in a thread of its own.

    `receiver_id` names this worker process among all receivers of a sender. What was received is also written
    to the folder `keep` (None: it is not). Every method but `restore` returns at once.
    """

    def __init__(self, receiver_id: str, keep: Path | None = None) -> None:
        self.receiver_id = receiver_id
        self._keep = keep
        self._lock = threading.Lock()
        self._status = ReceiverStatus("", ReceiverState.IDLE)
        self._staged: list[tuple[str, torch.Tensor]] = []
        self._deadline: groups.Deadline | None = None
        self._endpoint = ""
        self._store: TCPStore | None = None
        self._group: ProcessGroup | None = None
        self._group_number = -1
        self._serving = ""

    def prepare(self, transfer_id: str, endpoint: str, timeout: float) -> None:
        """Begin to receive `transfer_id` from `endpoint` (``host:port``); a transfer under way is given up.

        It fails by itself after `timeout` seconds. Follow it with `status`.
        """
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"endpoint must be host:port, not {endpoint!r}")
        self.abort(f"replaced by transfer {transfer_id}")
        deadline = groups.Deadline(timeout)
        with self._lock:
            self._deadline = deadline
            self._status = ReceiverStatus(transfer_id, ReceiverState.RECEIVING)
        threading.Thread(
            target=self._run,
            args=(transfer_id, host, int(port), deadline),
            name="agl-weight-receiver",
            daemon=True,
        ).start()

    def status(self) -> ReceiverStatus:
        """Where the current transfer stands."""
        with self._lock:
            return self._status

    def staged(self, transfer_id: str) -> list[tuple[str, torch.Tensor]]:
        """The received tensors, in host memory. Raises TransferError unless `transfer_id` is RECEIVED."""
        with self._lock:
            status = self._status
            if status.transfer_id != transfer_id or status.state is not ReceiverState.RECEIVED:
                raise TransferError(
                    f"transfer {transfer_id} is not staged here (current: {status.transfer_id or 'none'}, "
                    f"{status.state})"
                )
            return self._staged

    def restore(self, transfer_id: str, folder: Path, digest: str) -> None:
        """Stage weights that were kept on disk, as if they had been received. Raises TransferError."""
        self.abort(f"replaced by {transfer_id}")
        tensors = take_back(folder, digest)
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
        with self._lock:
            self._staged = tensors
            self._status = ReceiverStatus(transfer_id, ReceiverState.RECEIVED, digest, size, len(tensors))
            # Committed weights: their file stays, whatever becomes of this staging.
            self._serving = digest

    def loaded(self) -> None:
        """The staged weights serve now: free their memory, and keep no others."""
        self._serving = self.status().digest
        self._drop("loaded")
        if self._keep is not None:
            forget_others(self._keep, self._serving)

    def abort(self, reason: str) -> None:
        """Give up the current transfer, if any, and free its staging memory."""
        digest = self.status().digest
        self._drop(reason)
        if self._keep is not None and digest not in ("", self._serving):
            forget(self._keep, digest)

    def _drop(self, reason: str) -> None:
        with self._lock:
            if self._deadline is not None:
                self._deadline.cancel(reason)
            self._deadline = None
            self._staged = []
            self._status = ReceiverStatus("", ReceiverState.IDLE)

    def _run(self, transfer_id: str, host: str, port: int, deadline: groups.Deadline) -> None:
        try:
            staged, digests, received = self._receive(transfer_id, host, port, deadline)
        except Exception as error:  # every failure of the thread must reach the engine's report
            self._leave_group()
            reason = str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
            self._finish(deadline, ReceiverStatus(transfer_id, ReceiverState.FAILED, error=reason), [])
            return
        status = ReceiverStatus(
            transfer_id, ReceiverState.RECEIVED, combined_digest(digests), received, len(staged)
        )
        self._finish(deadline, status, staged)
        if self._keep is None:
            return
        try:
            keep(self._keep, status.digest, staged)
        except OSError as error:
            # The swap goes on; only a restart would miss them.
            logger.warning("weights %s not kept on disk: %s", status.digest, error)
        if status.digest not in (self.status().digest, self._serving):
            forget(self._keep, status.digest)

    def _finish(
        self, deadline: groups.Deadline, status: ReceiverStatus, staged: list[tuple[str, torch.Tensor]]
    ) -> None:
        with self._lock:
            if self._deadline is deadline:
                self._status, self._staged = status, staged

    def _receive(
        self, transfer_id: str, host: str, port: int, deadline: groups.Deadline
    ) -> tuple[list[tuple[str, torch.Tensor]], list[str], int]:
        store = self._connect(host, port, deadline)
        index = store.add(wire.join_counter(transfer_id), 1)
        hello = wire.JoinRequest(self.receiver_id, self._group_number, groups.supported_backends())
        store.set(wire.join_key(transfer_id, index), hello.encode())
        plan = wire.Plan.decode(groups.wait_key(store, wire.plan_key(transfer_id), deadline, "the plan"))
        group = self._join(store, plan, deadline)
        staged, digests, received = self._take_segments(store, group, transfer_id, plan, deadline)
        expected = json.loads(
            groups.wait_key(store, wire.digests_key(transfer_id), deadline, "the sender's digests")
        )
        store.add(wire.done_counter(transfer_id), 1)
        _verify(staged, digests, expected)
        return staged, digests, received

    def _connect(self, host: str, port: int, deadline: groups.Deadline) -> TCPStore:
        endpoint = f"{host}:{port}"
        if self._store is None or self._endpoint != endpoint:
            self._leave_group()
            self._store = groups.connect(host, port, deadline)
            self._endpoint = endpoint
        return self._store

    def _join(self, store: TCPStore, plan: wire.Plan, deadline: groups.Deadline) -> ProcessGroup:
        if self._group is None or self._group_number != plan.group:
            groups.discard(self._group)
            rank = plan.ranks[self.receiver_id]
            size = len(plan.ranks) + 1
            self._group = groups.create_group(store, plan.group, rank, size, plan.backend, deadline)
            self._group_number = plan.group
        return self._group

    def _take_segments(
        self,
        store: TCPStore,
        group: ProcessGroup,
        transfer_id: str,
        plan: wire.Plan,
        deadline: groups.Deadline,
    ) -> tuple[list[tuple[str, torch.Tensor]], list[str], int]:
        staged: list[tuple[str, torch.Tensor]] = []
        pending: list[Future[list[str]]] = []
        received = 0
        with ThreadPoolExecutor(1, thread_name_prefix="agl-weight-digest") as hasher:
            for index in _count():
                key = wire.segment_key(transfer_id, index)
                header = wire.SegmentHeader.decode(groups.wait_key(store, key, deadline, "a segment"))
                if not header.entries:
                    break
                memory = _receive_segment(group, header.nbytes, plan, deadline)
                staged += _views(memory, header)
                pending.append(hasher.submit(segment_digests, memory, header.entries))
                received += sum(entry.nbytes for entry in header.entries)
                self._progress(deadline, transfer_id, received, len(staged))
            digests = [digest for future in pending for digest in future.result()]
        return staged, digests, received

    def _progress(self, deadline: groups.Deadline, transfer_id: str, received: int, tensors: int) -> None:
        status = ReceiverStatus(
            transfer_id, ReceiverState.RECEIVING, received_bytes=received, tensors=tensors
        )
        self._finish(deadline, status, [])

    def _leave_group(self) -> None:
        groups.discard(self._group)
        self._group = None
        self._group_number = -1
        self._store = None
        self._endpoint = ""


def _receive_segment(
    group: ProcessGroup, nbytes: int, plan: wire.Plan, deadline: groups.Deadline
) -> torch.Tensor:
    import torch

    memory = torch.empty(nbytes, dtype=torch.uint8)
    for start in range(0, nbytes, plan.bucket_bytes):
        part = memory[start : start + plan.bucket_bytes]
        if plan.backend == "nccl":
            bounce = torch.empty(part.numel(), dtype=torch.uint8, device="cuda")
            groups.broadcast(group, bounce, deadline)
            part.copy_(bounce)
        else:
            groups.broadcast(group, part, deadline)
    return memory


def _views(memory: torch.Tensor, header: wire.SegmentHeader) -> list[tuple[str, torch.Tensor]]:
    import torch

    return [
        (e.name, memory[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).reshape(e.shape))
        for e in header.entries
    ]


def _verify(staged: list[tuple[str, torch.Tensor]], digests: list[str], expected: list[str]) -> None:
    """Raise TransferError naming the first tensor whose bytes are not those that were sent."""
    if len(digests) != len(expected):
        raise TransferError(f"digest mismatch: {len(expected)} tensors sent, {len(digests)} received")
    for (name, _), got, wanted in zip(staged, digests, expected, strict=True):
        if got != wanted:
            raise TransferError(f"digest mismatch: tensor {name} differs from what was sent")


def _count() -> range:
    return range(2**31)

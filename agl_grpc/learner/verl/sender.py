"""verl checkpoint engine ``agl``: the trainer's ranks as senders of weights to engines outside verl.

verl imports this module in every actor worker (``custom_backend_module``). Rank 0 sends; the other ranks take
part in gathering every parameter. Engines receive by themselves (``agl_grpc.weights``), so there is no
receiving half here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from agl_grpc.learner.errors import LearnerError
from agl_grpc.weights.adapters import adapter_set
from agl_grpc.weights.sender import WeightSender
from agl_grpc.weights.wire import DEFAULT_BUCKET_BYTES

BACKEND = "agl"
# verl's mode of `update_weights` in which a checkpoint engine gets the training engine; in others it gets
# parameters, of a model with LoRA those of its base.
SEND_MODE = "delta_sharded"


@CheckpointEngineRegistry.register(BACKEND)
class TransferEngine(CheckpointEngine):  # type: ignore[misc]  # verl is untyped
    """Sends the actor's weights as one transfer.

    Args:
        bucket_size: largest single broadcast in bytes, as verl configures it
            (``rollout.checkpoint_engine.update_weights_bucket_megabytes``); at most 512 MiB are used.
        is_master: whether this rank sends.
        host: address under which engines reach this process.
        collective: ``auto``, ``gloo`` or ``nccl``.
    """

    def __init__(
        self, bucket_size: int, is_master: bool = False, host: str = "127.0.0.1", collective: str = "auto"
    ) -> None:
        self._bucket_bytes = min(bucket_size, DEFAULT_BUCKET_BYTES)
        self._is_master = is_master
        self._host = host
        self._collective = collective
        self._sender: WeightSender | None = None
        self._transfer: tuple[str, int, float] = ("", 0, 0.0)

    def prepare(self) -> dict[str, Any]:
        """Opens the rendezvous on rank 0; answers its endpoint."""
        if self._is_master and self._sender is None:
            self._sender = WeightSender(self._host, bucket_bytes=self._bucket_bytes, backend=self._collective)
        return {"endpoint": self._sender.endpoint if self._sender else ""}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]) -> Any:
        raise LearnerError("engines outside verl form their own transfer group; verl's topology is not used")

    def init_process_group(self, transfer_id: str, receivers: int, timeout: float) -> None:
        """Names the next transfer, how many worker processes receive it, and its deadline in seconds."""
        self._transfer = (transfer_id, receivers, timeout)

    def cancel(self, reason: str) -> None:
        """Gives up a transfer that is under way; ``send_weights`` then raises with the reason."""
        if self._sender is not None:
            self._sender.cancel(reason)

    def finalize(self) -> None:
        """Nothing is kept between transfers but the process group, which stays while its members stay."""

    async def send_weights(self, engine: Any, global_steps: int | None = None) -> dict[str, Any]:
        """Sends what was trained: all parameters, or the adapter of a model with LoRA.

        Args:
            engine: verl's engine of the actor, as it gives it in ``SEND_MODE``.
            global_steps: the step, as verl gives it.

        Returns:
            Digest, bytes, tensors and seconds on rank 0, nothing elsewhere.
        """
        # Without `base_sync_done` verl gives the base of a model with LoRA, which nobody trains.
        weights, lora = engine.get_per_tensor_param(base_sync_done=True)
        if lora is not None:
            weights = adapter_set(weights, lora)
        if self._sender is None:
            # The generator gathers each parameter over all ranks: it has to be driven to its end here too.
            for _ in weights:
                pass
            return {}
        transfer_id, receivers, timeout = self._transfer
        report = await asyncio.to_thread(
            self._sender.send, transfer_id, weights, receivers=receivers, timeout=timeout
        )
        return {
            "digest": report.digest,
            "sent_bytes": report.sent_bytes,
            "tensors": report.tensors,
            "seconds": report.seconds,
        }

    async def receive_weights(self, global_steps: int | None = None) -> Any:
        raise LearnerError("engines outside verl receive weights by themselves")

"""Methods that vLLM adds to its workers (``--worker-extension-cls``), called through ``collective_rpc``.

Nothing here blocks the worker except `agl_load_weights` and `agl_load_adapter`, which run while generation is
paused. In an engine that serves several adapters, each has a receiver and staging memory: `adapter` names it,
empty for the whole model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl_grpc.weights.adapters import is_adapter
from agl_grpc.weights.loading import Signature, compare_signature, load_into, signature
from agl_grpc.weights.receiver import WeightReceiver
from agl_grpc.weights.served_adapters import ServedAdapters
from agl_grpc.weights.wire import ReceiverState, TransferError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXTENSION = f"{__name__}.WeightSwapExtension"
"""Qualified name for ``--worker-extension-cls``."""


class WeightSwapExtension:
    """Mixed into vLLM's worker class; its state hangs on the worker under names that begin with ``_agl``."""

    def agl_prepare_weights(
        self, engine_id: str, transfer_id: str, endpoint: str, timeout: float, keep: str, adapter: str = ""
    ) -> dict[str, Any]:
        """Begin to receive a transfer in the background; answers the state as `agl_weights_status` does.

        The first worker also keeps the weights in the folder `keep` (empty: nobody does).
        """
        self._agl_make_receiver(engine_id, keep, adapter).prepare(transfer_id, endpoint, timeout)
        return self.agl_weights_status(transfer_id, adapter)

    def agl_restore_weights(
        self, engine_id: str, transfer_id: str, keep: str, digest: str, adapter: str = ""
    ) -> dict[str, Any]:
        """Stage the weights of this digest from the folder `keep`; answers the state as above."""
        receiver = self._agl_make_receiver(engine_id, keep, adapter)
        try:
            receiver.restore(transfer_id, Path(keep), digest)
        except TransferError as error:
            return {
                "state": ReceiverState.FAILED.value,
                "digest": "",
                "received_bytes": 0,
                "error": str(error),
            }
        return self.agl_weights_status(transfer_id, adapter)

    def _agl_receivers(self) -> dict[str, WeightReceiver]:
        """By adapter."""
        receivers: dict[str, WeightReceiver] = self.__dict__.setdefault("_agl_receivers_by_adapter", {})
        return receivers

    def _agl_make_receiver(self, engine_id: str, keep: str, adapter: str) -> WeightReceiver:
        worker: Any = self
        receivers = self._agl_receivers()
        if adapter not in receivers:
            config = worker.vllm_config.parallel_config
            rank = config.data_parallel_index * config.world_size + worker.rank
            folder = Path(keep) if keep and rank == 0 else None
            receivers[adapter] = WeightReceiver(f"{engine_id}/{rank}", folder)
        return receivers[adapter]

    def _agl_signatures(self) -> dict[bool, Signature]:
        """What was loaded before into the model: of adapters (True) and of all weights (False)."""
        signatures: dict[bool, Signature] = self.__dict__.setdefault("_agl_accepted", {})
        return signatures

    def _agl_served_adapters(self) -> ServedAdapters:
        worker: Any = self
        if not hasattr(worker, "_agl_adapters"):
            pipelined = worker.vllm_config.parallel_config.pipeline_parallel_size > 1
            worker._agl_adapters = ServedAdapters(worker.model_runner.lora_manager, pipelined=pipelined)
        served: ServedAdapters = worker._agl_adapters
        return served

    def agl_weights_status(self, transfer_id: str, adapter: str = "") -> dict[str, Any]:
        """State of a transfer: ``state``, ``digest``, ``received_bytes``, ``error``.

        A transfer that does not fit the weights accepted before is FAILED here, before anything is paused.
        """
        receiver = self._agl_receivers().get(adapter)
        if receiver is None:
            return {"state": ReceiverState.IDLE.value, "digest": "", "received_bytes": 0, "error": ""}
        status = receiver.status()
        if status.transfer_id != transfer_id:
            return {"state": ReceiverState.IDLE.value, "digest": "", "received_bytes": 0, "error": ""}
        error = status.error
        if status.state is ReceiverState.RECEIVED:
            staged = receiver.staged(transfer_id)
            try:
                self._agl_check(staged, adapter)
            except TransferError as mismatch:
                error = str(mismatch)
        state = ReceiverState.FAILED if error else status.state
        return {
            "state": state.value,
            "digest": status.digest,
            "received_bytes": status.received_bytes,
            "error": error,
        }

    def _agl_check(self, staged: list[tuple[str, torch.Tensor]], adapter: str) -> None:
        """Raises TransferError for what this worker cannot load."""
        if adapter:
            self._agl_served_adapters().check(staged)
            return
        # An adapter is compared with an adapter, all weights with all weights.
        accepted = self._agl_signatures().get(is_adapter(staged))
        if accepted is not None:
            compare_signature(accepted, signature(staged))

    def agl_load_weights(self, transfer_id: str) -> dict[str, Any]:
        """Load the staged tensors into the model and free them.

        Answers ``error`` (empty when loaded) and ``rolled_back``: whether a failed load was undone by reading
        the model from disk again, which is possible as long as no transfer was ever loaded.
        """
        from vllm.config import set_current_vllm_config

        worker: Any = self
        receiver = self._agl_receivers()[""]
        runner = worker.model_runner
        accepted = self._agl_signatures()
        first = not accepted
        try:
            staged = receiver.staged(transfer_id)
            with set_current_vllm_config(worker.vllm_config):
                load_into(runner.get_model(), worker.vllm_config, staged)
        except Exception as error:  # vLLM's loaders raise anything; the engine has to hear of all of it
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return {"error": reason, "rolled_back": first and self._agl_reload_from_disk()}
        accepted[is_adapter(staged)] = signature(staged)
        receiver.loaded()
        return {"error": "", "rolled_back": False}

    def agl_load_adapter(self, transfer_id: str, adapter: str, number: int, folder: str) -> dict[str, Any]:
        """Serve the staged adapter under its name; `number` and `folder` are vLLM's own for it.

        Answers as `agl_load_weights`; a failed load is always undone, if that can be done.
        """
        receiver = self._agl_receivers()[adapter]
        try:
            staged = receiver.staged(transfer_id)
        except TransferError as missing:
            return {"error": str(missing), "rolled_back": True}
        error, rolled_back = self._agl_served_adapters().replace(adapter, number, folder, staged)
        if not error:
            receiver.loaded()
        return {"error": error, "rolled_back": rolled_back}

    def agl_abort_weights(self, transfer_id: str, reason: str, adapter: str = "") -> None:
        """Give up a transfer (empty: whichever there is) and free its memory; another one is left alone."""
        receiver = self._agl_receivers().get(adapter)
        if receiver is not None and transfer_id in ("", receiver.status().transfer_id):
            receiver.abort(reason)

    def _agl_reload_from_disk(self) -> bool:
        try:
            worker: Any = self
            worker.reload_weights()
        except Exception:  # vLLM raises anything; the caller is told that the rollback did not work
            logger.exception("the weights that served before could not be restored")
            return False
        return True

"""Methods that vLLM adds to its workers (``--worker-extension-cls``), called through ``collective_rpc``.

Nothing here blocks the worker except `agl_load_weights`, which runs while generation is paused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agl_grpc.weights.adapters import is_adapter
from agl_grpc.weights.loading import Signature, compare_signature, load_into, signature
from agl_grpc.weights.receiver import WeightReceiver
from agl_grpc.weights.wire import ReceiverState, TransferError

EXTENSION = f"{__name__}.WeightSwapExtension"
"""Qualified name for ``--worker-extension-cls``."""


class WeightSwapExtension:
    """Mixed into vLLM's worker class; its state hangs on the worker under names that begin with ``_agl``."""

    def agl_prepare_weights(
        self, engine_id: str, transfer_id: str, endpoint: str, timeout: float, keep: str
    ) -> dict[str, Any]:
        """Begin to receive a transfer in the background; answers the state as `agl_weights_status` does.

        The first worker also keeps the weights in the folder `keep` (empty: nobody does).
        """
        self._agl_make_receiver(engine_id, keep).prepare(transfer_id, endpoint, timeout)
        return self.agl_weights_status(transfer_id)

    def agl_restore_weights(self, engine_id: str, transfer_id: str, keep: str, digest: str) -> dict[str, Any]:
        """Stage the weights of this digest from the folder `keep`; answers the state as above."""
        receiver = self._agl_make_receiver(engine_id, keep)
        try:
            receiver.restore(transfer_id, Path(keep), digest)
        except TransferError as error:
            return {
                "state": ReceiverState.FAILED.value,
                "digest": "",
                "received_bytes": 0,
                "error": str(error),
            }
        return self.agl_weights_status(transfer_id)

    def _agl_make_receiver(self, engine_id: str, keep: str) -> WeightReceiver:
        worker: Any = self
        if getattr(worker, "_agl_receiver", None) is None:
            config = worker.vllm_config.parallel_config
            rank = config.data_parallel_index * config.world_size + worker.rank
            folder = Path(keep) if keep and rank == 0 else None
            worker._agl_receiver = WeightReceiver(f"{engine_id}/{rank}", folder)
        receiver: WeightReceiver = worker._agl_receiver
        return receiver

    def _agl_signatures(self) -> dict[bool, Signature]:
        """What was loaded before: of adapters (True) and of all weights (False)."""
        worker: Any = self
        if not hasattr(worker, "_agl_accepted"):
            worker._agl_accepted = {}
        signatures: dict[bool, Signature] = worker._agl_accepted
        return signatures

    def agl_weights_status(self, transfer_id: str) -> dict[str, Any]:
        """State of a transfer: ``state``, ``digest``, ``received_bytes``, ``error``.

        A transfer that does not fit the weights accepted before is FAILED here, before anything is paused.
        """
        worker: Any = self
        receiver: WeightReceiver | None = getattr(worker, "_agl_receiver", None)
        if receiver is None:
            return {"state": ReceiverState.IDLE.value, "digest": "", "received_bytes": 0, "error": ""}
        status = receiver.status()
        if status.transfer_id != transfer_id:
            return {"state": ReceiverState.IDLE.value, "digest": "", "received_bytes": 0, "error": ""}
        error = status.error
        if status.state is ReceiverState.RECEIVED:
            staged = receiver.staged(transfer_id)
            # An adapter is compared with an adapter, all weights with all weights.
            accepted = self._agl_signatures().get(is_adapter(staged))
            try:
                if accepted is not None:
                    compare_signature(accepted, signature(staged))
            except TransferError as mismatch:
                error = str(mismatch)
        state = ReceiverState.FAILED if error else status.state
        return {
            "state": state.value,
            "digest": status.digest,
            "received_bytes": status.received_bytes,
            "error": error,
        }

    def agl_load_weights(self, transfer_id: str) -> dict[str, Any]:
        """Load the staged tensors into the model and free them.

        Answers ``error`` (empty when loaded) and ``rolled_back``: whether a failed load was undone by reading
        the model from disk again, which is possible as long as no transfer was ever loaded.
        """
        from vllm.config import set_current_vllm_config

        worker: Any = self
        receiver: WeightReceiver = worker._agl_receiver
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

    def agl_abort_weights(self, transfer_id: str, reason: str) -> None:
        """Give up a transfer (empty: whichever there is) and free its memory; another one is left alone."""
        receiver: WeightReceiver | None = getattr(self, "_agl_receiver", None)
        if receiver is not None and transfer_id in ("", receiver.status().transfer_id):
            receiver.abort(reason)

    def _agl_reload_from_disk(self) -> bool:
        try:
            worker: Any = self
            worker.reload_weights()
        except Exception:  # whatever went wrong, the answer is that the rollback did not work
            return False
        return True

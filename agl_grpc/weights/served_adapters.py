"""Several adapters of one base, each served by vLLM under a name of its own: their weights inside a worker.

vLLM loads an adapter from a folder, at its start and again whenever it has dropped it from its cache. Here it
is given the tensors that came over the wire in that folder's place, so that no older ones can come back.
Touches vllm, and only inside a vLLM worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from agl_grpc.weights.adapters import SCALING, is_adapter
from agl_grpc.weights.wire import TransferError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Tensors = list[tuple[str, "torch.Tensor"]]
_A, _B = ".lora_A.weight", ".lora_B.weight"


def adapter_rank(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Rank of an adapter set.

    Raises:
        TransferError: these are whole weights, or some module was trained as a whole: vLLM has no adapter of
            that kind.
    """
    given = list(tensors)
    if not is_adapter(given):
        raise TransferError(
            "this engine serves an adapter under that name and was sent whole weights: train it with "
            "actor_rollout_ref.model.lora_rank above 0"
        )
    ranks: set[int] = set()
    for name, tensor in given:
        if name.endswith(_A):
            ranks.add(int(tensor.shape[0]))
        elif name.endswith(_B):
            ranks.add(int(tensor.shape[1]))
        elif name != SCALING:
            raise TransferError(f"{name} was trained as a whole, which an adapter in vLLM cannot be")
    if len(ranks) != 1:
        raise TransferError(f"the adapter has modules of several ranks: {sorted(ranks)}")
    return ranks.pop()


class ServedAdapters:
    """The adapters of one vLLM worker that came over the wire.

    Args:
        manager: vLLM's `WorkerLoRAManager` of this worker, whose way to load an adapter is replaced.
        pipelined: whether the worker has a part of the layers only.
    """

    def __init__(self, manager: Any, *, pipelined: bool) -> None:
        self._manager = manager
        self._pipelined = pipelined
        self._from_folder = manager._load_adapter
        self._tensors: dict[str, Tensors] = {}
        manager._load_adapter = self._load

    def check(self, tensors: Tensors) -> None:
        """Raises TransferError where the engine cannot serve an adapter; nothing is changed."""
        rank = adapter_rank(tensors)
        most = int(self._manager.lora_config.max_lora_rank)
        if rank > most:
            raise TransferError(
                f"the adapter has rank {rank}, the engine takes {most}: start it with --max-lora-rank {rank}"
            )
        known = self._known_modules()
        for module in sorted({self._module(name) for name, _ in tensors if name != SCALING}):
            # vLLM would pass over it without a word.
            if module not in known and not self._elsewhere(module):
                raise TransferError(f"the adapter changes {module}, of which this model takes no adapter")

    def replace(self, name: str, number: int, folder: str, tensors: Tensors) -> tuple[str, bool]:
        """Serve other weights under an adapter's name, from the next token on.

        Args:
            name: the adapter's, as requests name it.
            number: vLLM's for it (`lora_int_id`).
            folder: where vLLM has loaded it from at its start.
            tensors: the adapter set; they are kept.

        Returns:
            What went wrong (empty: nothing), and whether the weights before serve again then.
        """
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, number, folder, load_inplace=True)
        before = self._tensors.get(name)
        self._tensors[name] = tensors
        try:
            self._manager.add_adapter(request)
        except Exception as error:  # vLLM raises anything; what served must serve again
            return f"{type(error).__name__}: {error}".splitlines()[0], self._take_back(request, before)
        return "", False

    def _take_back(self, request: Any, before: Tensors | None) -> bool:
        if before is None:
            del self._tensors[request.lora_name]
        else:
            self._tensors[request.lora_name] = before
        try:
            self._manager.add_adapter(request)
        except Exception:  # vLLM raises anything; the caller is told that the rollback did not work
            logger.exception("the weights that served before could not be restored")
            return False
        return True

    def _module(self, tensor: str) -> str:
        """The module that a tensor of an adapter belongs to, by vLLM's name."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        module, _ = parse_fine_tuned_lora_name(tensor, self._mapper)
        return str(module)

    @property
    def _mapper(self) -> Any:
        mapper = getattr(self._manager._adapter_manager.model, "hf_to_vllm_mapper", None)
        return None if mapper is None else mapper.get_rename_mapper()

    def _known_modules(self) -> set[str]:
        """Modules of this worker that can have an adapter; of those that vLLM has packed, their parts."""
        inner = self._manager._adapter_manager
        return {part for name in inner.modules for part in inner.packed_modules.get(name, [name])}

    def _elsewhere(self, module: str) -> bool:
        """Whether a module may be another worker's, or an expert, which vLLM names in several ways."""
        return self._pipelined or ".experts" in module

    def _load(self, request: Any) -> Any:
        """In the place of vLLM's own: what is known of that name, else the folder."""
        tensors = self._tensors.get(request.lora_name)
        if tensors is None:
            return self._from_folder(request)
        from vllm.lora.peft_helper import PEFTHelper

        given = dict(tensors)
        scaling = float(given.pop(SCALING))
        rank = adapter_rank(tensors)
        manager = self._manager
        return manager._lora_model_cls.from_lora_tensors(
            lora_model_id=request.lora_int_id,
            tensors=given,
            # vLLM divides by the rank again.
            peft_helper=PEFTHelper(r=rank, lora_alpha=scaling * rank, target_modules=[]),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=self._mapper,
        )

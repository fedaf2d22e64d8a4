"""What tests need of torch, in one process of the engine environment: imports are paid for once.

Reads one JSON command a line from standard input and answers one JSON line each; see `torch_client`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from agl_grpc.weights import TransferError
from agl_grpc.weights import group as groups


class Helper:
    """The commands, by their names."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], Any] = {}
        self._senders: dict[str, Any] = {}
        self._tensors: dict[str, Any] = {}

    def make_model(self, folder: str, seed: int = 0) -> None:
        """Write the tiny model."""
        from tests.support.tiny_model import make

        make(folder, seed)

    def make_vision_model(self, folder: str) -> None:
        """Write the tiny model that sees pictures."""
        from tests.support.tiny_vision_model import make

        make(folder)

    def logprobs(self, model: str, rows: list[dict[str, Any]], weights: str = "") -> list[list[float]]:
        """Logprobs of each row's response after its prompt at its temperature, by transformers."""
        import torch

        network = self._model(model, weights)
        answer = []
        for row in rows:
            ids = torch.tensor([row["prompt"] + row["response"]])
            with torch.no_grad():
                logits = network(ids).logits.double() / row.get("temperature", 1.0)
            table = torch.log_softmax(logits, -1)[0, len(row["prompt"]) - 1 : -1]
            answer.append(table.gather(1, ids[0, len(row["prompt"]) :, None])[:, 0].tolist())
        return answer

    def text(self, model: str, rows: list[dict[str, Any]]) -> list[str]:
        """Text of each row's response after its prompt, decoded token by token as vLLM streams it."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json")
        texts = []
        for row in rows:
            stream = tokenizers.decoders.DecodeStream(ids=row["prompt"], skip_special_tokens=True)
            texts.append("".join(stream.step(tokenizer, token) or "" for token in row["response"]))
        return texts

    def perturb(self, model: str, out: str, seed: int, rename: dict[str, str]) -> str:
        """Change all weights a little, keep them as `out`, open a sender for them; its endpoint."""
        import torch
        from safetensors.torch import save_file

        from agl_grpc.weights.sender import WeightSender

        generator = torch.Generator().manual_seed(seed)
        changed = {
            name: (tensor + torch.randn(tensor.shape, generator=generator) * 0.05).contiguous()
            for name, tensor in self._model(model, "").state_dict().items()
        }
        save_file(changed, out)
        sender = WeightSender(bucket_bytes=100_000)
        self._senders[out] = sender
        self._tensors[out] = {rename.get(name, name): tensor for name, tensor in changed.items()}
        return str(sender.endpoint)

    def adapt(self, model: str, out: str, seed: int, rank: int, rename: dict[str, str]) -> str:
        """Make an adapter of this rank, keep the merged model as `out`, open a sender for the adapter."""
        import torch
        from safetensors.torch import save_file

        from agl_grpc.weights.adapters import adapter_set
        from agl_grpc.weights.sender import WeightSender

        generator = torch.Generator().manual_seed(seed)
        state = self._model(model, "").state_dict()
        adapter: dict[str, torch.Tensor] = {}
        changed = {name: tensor.clone() for name, tensor in state.items()}
        for name, tensor in state.items():
            if name.endswith("_proj.weight"):
                rows, columns = tensor.shape
                a, b = (
                    torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, columns), (rows, rank))
                )
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                for old, new in rename.items():
                    stem = stem.replace(old, new)
                adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
                changed[name] += 2.0 * (b @ a)
        save_file(changed, out)
        self._senders[out] = sender = WeightSender(bucket_bytes=100_000)
        self._tensors[out] = dict(adapter_set(adapter.items(), {"r": rank, "lora_alpha": 2 * rank}))
        return str(sender.endpoint)

    def send(self, out: str, transfer: str, flip: bool = False) -> dict[str, Any]:
        """Send the weights of `out` to one receiver; `flip` changes a byte on its way."""
        with flipping() if flip else contextlib.nullcontext():
            try:
                report = self._senders[out].send(
                    transfer, self._tensors[out].items(), receivers=1, timeout=60
                )
            except TransferError as error:
                return {"error": str(error)}
        return {"digest": report.digest, "bytes": report.sent_bytes}

    def _model(self, folder: str, weights: str) -> Any:
        if (folder, weights) not in self._models:
            import torch
            from safetensors.torch import load_file
            from transformers import AutoModelForCausalLM

            network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if weights:
                network.load_state_dict(load_file(weights))
            self._models[folder, weights] = network
        return self._models[folder, weights]


@contextlib.contextmanager
def flipping() -> Iterator[None]:
    """Every broadcast of this process changes one bit after the digest was taken."""
    honest: Callable[..., None] = groups.broadcast

    def flip(group: Any, tensor: Any, deadline: Any) -> None:
        damaged = tensor.clone()
        damaged[0] ^= 1
        honest(group, damaged, deadline)

    groups.broadcast = flip
    try:
        yield
    finally:
        groups.broadcast = honest


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print progress; the answers' channel is ours
    helper = Helper()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"result": getattr(helper, command.pop("do"))(**command)}
        except Exception:  # the test that asked shows it
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

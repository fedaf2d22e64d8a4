"""A learner for the tests: perturbs the model, offers the result to one receiver and keeps it as a file.

``python -m tests.interceptor.send_weights MODEL OUT SEED SCENARIO`` prints the endpoint on its first line,
then reads transfer ids from standard input, one a line, and prints a JSON report for each transfer.
Scenarios: ``honest``; ``flip`` (a byte changes on its way); ``renamed`` (one tensor under a wrong name).
"""

from __future__ import annotations

import json
import sys

from agl_grpc.weights import TransferError
from agl_grpc.weights import group as groups


def flip_a_byte() -> None:
    honest = groups.broadcast

    def flipping(group: object, tensor: object, deadline: groups.Deadline) -> None:
        damaged = tensor.clone()  # type: ignore[attr-defined]  # a torch tensor
        damaged[0] ^= 1
        honest(group, damaged, deadline)  # type: ignore[arg-type]  # as given

    groups.broadcast = flipping  # type: ignore[assignment]  # fault injection


def main() -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from agl_grpc.weights.sender import WeightSender

    folder, out, seed, scenario = sys.argv[1:5]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(int(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, out)
    if scenario == "flip":
        flip_a_byte()
    if scenario == "renamed":
        tensors["model.layers.0.unknown"] = tensors.pop("model.norm.weight")
    sender = WeightSender(bucket_bytes=100_000)
    print(sender.endpoint, flush=True)
    for line in sys.stdin:
        try:
            report = sender.send(line.strip(), tensors.items(), receivers=1, timeout=60)
        except TransferError as error:
            print(json.dumps({"error": str(error)}), flush=True)
        else:
            print(
                json.dumps({"digest": report.digest, "seconds": report.seconds, "bytes": report.sent_bytes}),
                flush=True,
            )
    sender.close()


if __name__ == "__main__":
    main()

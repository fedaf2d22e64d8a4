"""Logprobs of response tokens by transformers, for comparison with the engine's.

Reads JSON from standard input: ``model`` (folder), ``weights`` (a safetensors file instead of the model's
own, optional) and ``rows`` of ``prompt`` and ``response`` token ids; prints a list of lists of logprobs.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    asked = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    if asked.get("weights"):
        from safetensors.torch import load_file

        model.load_state_dict(load_file(asked["weights"]))
    answer = []
    for row in asked["rows"]:
        ids = torch.tensor([row["prompt"] + row["response"]])
        with torch.no_grad():
            logits = model(ids).logits.double()
        table = torch.log_softmax(logits / row.get("temperature", 1.0), -1)[0, len(row["prompt"]) - 1 : -1]
        answer.append(table.gather(1, ids[0, len(row["prompt"]) :, None])[:, 0].tolist())
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

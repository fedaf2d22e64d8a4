"""verl's merge of the shards of several ranks, without its rounding.

verl's merger turns every tensor into bfloat16, whatever was trained; in this process that leaves tensors as
they are. Run as a module, with verl's arguments.
"""

from __future__ import annotations

import runpy
from typing import Any


def main() -> None:
    """Runs `python -m verl.model_merger` on this process's arguments."""
    import torch

    def as_it_is(tensor: torch.Tensor, *_arguments: Any, **_options: Any) -> torch.Tensor:
        return tensor

    torch.Tensor.bfloat16 = as_it_is  # in this process alone
    runpy.run_module("verl.model_merger", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""A policy loss that goes wrong, for tests; verl imports it as its ``external_lib``."""

from __future__ import annotations

import threading
from typing import Any

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss

OUT_OF_MEMORY, HANGS = 3, 4
_calls = 0


@register_policy_loss("bad")
def bad(**arguments: Any) -> Any:
    """In the third update asks for a petabyte; never comes back from the fourth."""
    global _calls
    _calls += 1
    if _calls == OUT_OF_MEMORY:
        torch.empty(1 << 50, dtype=torch.uint8)
    if _calls == HANGS:
        threading.Event().wait()
    return get_policy_loss_fn("vanilla")(**arguments)

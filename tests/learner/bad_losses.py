"""Policy losses that go wrong in their third update, for tests; verl imports them as its ``external_lib``."""

from __future__ import annotations

import threading
from typing import Any

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss

_GOOD_UPDATES = 2
_calls = {"out_of_memory": 0, "hanging": 0}


def _is_bad(name: str) -> bool:
    _calls[name] += 1
    return _calls[name] > _GOOD_UPDATES


@register_policy_loss("out_of_memory")
def out_of_memory(**arguments: Any) -> Any:
    """Asks for a petabyte."""
    if _is_bad("out_of_memory"):
        torch.empty(1 << 50, dtype=torch.uint8)
    return get_policy_loss_fn("vanilla")(**arguments)


@register_policy_loss("hanging")
def hanging(**arguments: Any) -> Any:
    """Never comes back."""
    if _is_bad("hanging"):
        threading.Event().wait()
    return get_policy_loss_fn("vanilla")(**arguments)

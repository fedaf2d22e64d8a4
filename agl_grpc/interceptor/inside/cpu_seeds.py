"""Seeds of requests on a CPU: vLLM's engine dies of one whose prompt is read in several pieces.

After each piece but the last vLLM samples a token, throws it away and turns the request's generator back,
which generators of a CPU do not offer (`CPU Generator does not use offset`, vLLM 0.32). So they are out of
sight while such a token is sampled: nothing has to be turned back, and the seeded stream begins with the
first real token.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_agl_grpc_seeds"


def install() -> None:
    """Changes the model runner of this process if it computes on a CPU; a second call changes nothing."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.sample_tokens
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        thrown_away = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        hidden = {
            int(index): batch.generators.pop(int(index))
            for index in thrown_away
            if int(index) in batch.generators
        }
        try:
            return original(self, *args, **kwargs)
        finally:
            batch.generators.update(hidden)

    setattr(sample_tokens, _MARK, True)
    GPUModelRunner.sample_tokens = sample_tokens

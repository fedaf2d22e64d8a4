"""Aborts by the engine itself, undone: a sequence goes on where it was, in the same answer.

Trainers that update weights under ``pause_generation(mode="abort")``, as verl does, have the engine core drop
every request. What the API server knows of a request (its text, stop strings, logprobs, versions) outlives
that: so the request is handed to the core once more, with what it has sampled at the end of its prompt, and
waits there for the engine to resume. An abort on the client's behalf never comes this way.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agl_grpc.interceptor.inside import engine_state
from agl_grpc.interceptor.inside.core_logprobs import without_ours

logger = logging.getLogger("agl_grpc.interceptor")

_FIRST_PAUSE = 0.05
_LAST_PAUSE = 1.0


class AbortedByEngine(Exception):
    """Put into a request's queue: its answer cannot go on."""


@dataclass
class _Sequence:
    """A captured sequence: vLLM's state and request, what to call when it must end, and its last abort."""

    state: Any
    request: Any
    fail: Callable[[str], None]
    tokens: int = -1
    since: float = 0.0
    tries: int = 0
    timer: asyncio.TimerHandle | None = None


class AbortResumer:
    """Hands captured sequences that the engine core has aborted to the core again.

    A sequence that has not sampled a token within `limit` seconds of its abort fails, as does one whose
    sampling depends on more than its tokens (see `obstacle`).
    """

    def __init__(self, engine_client: Any, limit: float) -> None:
        self._client = engine_client
        self._processor = engine_client.output_processor
        self._limit = limit
        self._sequences: dict[str, _Sequence] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.resumed = 0

    def install(self) -> None:
        """Watch what the engine core says, and note when the engine is shut down."""
        engine_state.watch_outputs(self._processor, self._on_abort)
        shutdown = self._client.shutdown

        def closing(*args: Any, **kwargs: Any) -> Any:
            self._closing = True
            return shutdown(*args, **kwargs)

        self._client.shutdown = closing

    def track(self, state: Any, request: Any, fail: Callable[[str], None]) -> None:
        """Look after a sequence from now on; `fail` is told why it cannot go on."""
        self._sequences[state.request_id] = _Sequence(state, request, fail)

    def end(self, state: Any, reason: str) -> None:
        """End a sequence as an error; vLLM then takes it out of the engine core, too."""
        sequence = self._sequences.get(state.request_id)
        if sequence is not None:
            self._end(sequence, reason)

    def forget(self, state: Any) -> None:
        """The sequence has ended."""
        sequence = self._sequences.pop(state.request_id, None)
        if sequence is not None and sequence.timer is not None:
            sequence.timer.cancel()

    def _on_abort(self, request_id: str) -> bool:
        """Whether the abort is dealt with here, so that vLLM need not hear of it."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        reason = "it is stopping" if self._closing else obstacle(sequence.request, sequence.state)
        if reason:
            self._fail(sequence, reason)
        else:
            task = asyncio.create_task(self._resubmit(sequence))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return True

    async def _resubmit(self, sequence: _Sequence) -> None:
        state = sequence.state
        sampled = engine_state.tokens_so_far(state)
        if sampled != sequence.tokens:
            sequence.tokens, sequence.since, sequence.tries = sampled, time.monotonic(), 0
        else:
            # Aborted again before it came to its turn.
            await asyncio.sleep(min(_LAST_PAUSE, _FIRST_PAUSE * 2**sequence.tries))
            sequence.tries += 1
        left = sequence.since + self._limit - time.monotonic()
        if left <= 0:
            self._give_up(sequence, sampled)
        if not self._lives(state):
            return
        try:
            await self._client.engine_core.add_request_async(continued(sequence.request, state))
        except Exception as error:  # a dead engine, or one that takes nothing any more
            self._fail(sequence, f"it does not take the request again: {error or type(error).__name__}")
            return
        if not self._lives(state):
            await self._client.engine_core.abort_requests_async([state.request_id])
            return
        self.resumed += 1
        if sequence.timer is not None:
            sequence.timer.cancel()
        sequence.timer = asyncio.get_running_loop().call_later(left, self._give_up, sequence, sampled)

    def _lives(self, state: Any) -> bool:
        """Whether somebody still waits for the sequence."""
        return state.request_id in self._sequences and state.request_id in self._processor.request_states

    def _give_up(self, sequence: _Sequence, sampled: int) -> None:
        """End a sequence that has sampled nothing since its abort."""
        if self._lives(sequence.state) and engine_state.tokens_so_far(sequence.state) == sampled:
            self._fail(sequence, f"it did not resume within {self._limit:g} s")

    def _fail(self, sequence: _Sequence, reason: str) -> None:
        self._end(sequence, f"the engine aborted this answer and cannot continue it: {reason}")

    def _end(self, sequence: _Sequence, said: str) -> None:
        self.forget(sequence.state)
        logger.warning("request %s: %s", sequence.state.external_req_id, said)
        sequence.fail(said)
        sequence.state.queue.put(AbortedByEngine(said))


def obstacle(request: Any, state: Any) -> str:
    """Why a request cannot be continued from its tokens alone; empty when it can.

    A continued request counts what it had sampled as prompt: what looks at the response's tokens only, or
    keeps a state of its own in the engine core, would sample from another distribution.
    """
    params = request.sampling_params
    hindrances = {
        "a multimodal prompt": request.mm_features,
        "a prompt of embeddings": request.prompt_embeds is not None,
        "streamed input": request.resumable,
        "structured output": params.structured_outputs is not None,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "bad_words": params.bad_words,
        "extra sampling arguments": without_ours(params.extra_args),
        "a thinking budget": getattr(params, "thinking_token_budget", None) is not None,
        "repetition detection": getattr(params, "repetition_detection", None) is not None,
        "a decode trace": getattr(params, "trace_decode_token_ids", None),
        "routed experts": state.routed_experts_chunks,
    }
    named = [name for name, found in hindrances.items() if found]
    # Nothing sampled yet: the request starts again as it was.
    return f"it uses {', '.join(named)}" if named and engine_state.tokens_so_far(state) else ""


def continued(request: Any, state: Any) -> Any:
    """The request that samples what is still to come after the tokens of `state`."""
    again = copy.copy(request)
    sampled = list(state.detokenizer.output_token_ids)
    if not sampled:
        return again
    params = again.sampling_params = copy.copy(request.sampling_params)
    params.max_tokens -= len(sampled)
    params.min_tokens = max(0, params.min_tokens - len(sampled))
    # A seed would repeat the random numbers of the answer's beginning; what an abort falls into cannot be
    # reproduced in any case.
    params.seed = None
    params.prompt_logprobs = None
    again.prompt_token_ids = [*request.prompt_token_ids, *sampled]
    return again

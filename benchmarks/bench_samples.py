"""From stored model calls to packed columns, in one process: tokens a second of CPU, and growth with turns.

What is measured is what the store does for StreamBatch between its database and the wire: token tree, rows,
columns, bytes. Database, network and the learner's tensors are not in it.
"""

from __future__ import annotations

import argparse
import sys
import time

from agl_grpc.model import raw
from agl_grpc.sample import AttemptRecord, CallSpan, build_attempt, pack
from agl_grpc.store.training.samples import PAGE_ENTRIES, PAGE_TOKENS
from agl_grpc.v1 import model_call_pb2 as pb
from agl_grpc.v1.reward_pb2 import Reward
from benchmarks.figures import Row, figure, run


def conversation(turns: int, prompt: int, response: int) -> AttemptRecord:
    """An attempt whose prompts are differences to the turn before."""
    calls = []
    for turn in range(turns):
        tokens = pb.PromptTokens(token_ids=range(prompt))
        if turn:
            tokens.base_span_id, tokens.base_length = calls[-1].span_id, turn * (prompt + response)
        call = pb.ModelCall(
            prompt=tokens,
            mode="train",
            outcome=pb.MODEL_CALL_OUTCOME_COMPLETE,
            logprob_semantics=pb.LOGPROB_SEMANTICS_PROCESSED,
        )
        choice = call.choices.add(token_ids=range(response), logprobs=[-0.5] * response)
        choice.policy_runs.add(start=0, end=response, policy_version=1)
        bare = raw.RawModelCall.FromString(call.SerializeToString())
        calls.append(CallSpan((turn + 1).to_bytes(8), turn, turn, False, bare))
    return AttemptRecord("ro", "at", "g", calls, [Reward(value=1.0)])


def cpu(record: AttemptRecord, count: int) -> float:
    """Seconds of CPU to build and pack an attempt so many times, in answers as large as the store's."""
    tokens = sum(row.length for row in build_attempt(record).rows)
    page = max(1, min(PAGE_ENTRIES, PAGE_TOKENS // tokens))
    start = time.process_time()
    for first in range(0, count, page):
        rows = [row for _ in range(min(page, count - first)) for row in build_attempt(record).rows]
        pack(rows).SerializeToString()
    return time.process_time() - start


def measure(options: argparse.Namespace) -> list[Row]:
    """Short rows, long rows, and conversations of more and more turns."""
    rows = []
    for tokens in (64, 4096):
        count = max(1, int(options.tokens / tokens))
        rate = tokens * count / cpu(conversation(1, tokens // 2, tokens // 2), count) / 1e6
        rows.append(figure(f"rows of {tokens:,} tokens", "million tokens/s", rate))
    for turns in (10, 50, 200):
        count = max(1, int(options.tokens / turns / 200))
        rate = turns * 200 * count / cpu(conversation(turns, 100, 100), count) / 1e6
        rows.append(figure(f"conversations of {turns} turns of 200 tokens", "million tokens/s", rate))
    return rows


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, tokens=(1_000_000, "tokens of each measurement")))

"""From stored spans to packed columns, in one process: tokens a second of CPU, and growth with turns.

What is measured is what the store does for StreamBatch between its database and the wire (the spans' bytes
parsed, token tree, rows, columns, bytes), and what the learner's side does with it: a TensorDict of jagged
tensors, and the same through verl's TransferQueue. Reading the rows of the database, and the network, are not
in it; nor is parsing, where a figure says "parsed calls".
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agl_grpc.model import raw
from agl_grpc.sample import AttemptRecord, CallSpan, build_attempt, pack
from agl_grpc.sample.calls import read_calls
from agl_grpc.store.training.samples import PAGE_ENTRIES, PAGE_TOKENS
from agl_grpc.v1 import model_call_pb2 as pb
from agl_grpc.v1 import span_pb2
from agl_grpc.v1.reward_pb2 import Reward
from benchmarks.figures import Row, figure, run
from tests.support.environments import learner_python

PICTURE = Path(__file__).parent / "results" / "samples-growth.png"


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


def span_bytes(record: AttemptRecord) -> list[bytes]:
    """The attempt's spans as the database holds them."""
    return [
        span_pb2.Span(
            trace_id=bytes(16),
            span_id=call.span_id,
            name="model_call tiny",
            start_time_unix_nano=call.start,
            end_time_unix_nano=call.start + 1,
            model_call=pb.ModelCall.FromString(call.call.SerializeToString()),
        ).SerializeToString()
        for call in read_calls(record.spans)
    ]


def from_bytes(record: AttemptRecord, count: int) -> float:
    """As `cpu`, from the spans' bytes on, each parsed as `StreamBatch` does it."""
    stored = span_bytes(record)
    parse = raw.RawSpan.FromString
    tokens = sum(row.length for row in build_attempt(record).rows)
    page = max(1, min(PAGE_ENTRIES, PAGE_TOKENS // tokens))
    start = time.process_time()
    for first in range(0, count, page):
        rows = []
        for _ in range(min(page, count - first)):
            spans = [parse(data) for data in stored]
            calls = [
                CallSpan(span.span_id, span.start_time_unix_nano, place, False, span.model_call)
                for place, span in enumerate(spans)
            ]
            rows += build_attempt(replace(record, spans=calls)).rows
        pack(rows).SerializeToString()
    return time.process_time() - start


def cpu(record: AttemptRecord, count: int) -> float:
    """Seconds of CPU to build and pack an attempt so many times, in answers as large as the store's."""
    tokens = sum(row.length for row in build_attempt(record).rows)
    page = max(1, min(PAGE_ENTRIES, PAGE_TOKENS // tokens))
    start = time.process_time()
    for first in range(0, count, page):
        rows = [row for _ in range(min(page, count - first)) for row in build_attempt(record).rows]
        pack(rows).SerializeToString()
    return time.process_time() - start


def packed(turns: int, tokens: int, total: int) -> list[bytes]:
    """The answers of `StreamBatch` with about so many tokens, of attempts of one length, as bytes."""
    record = conversation(turns, tokens // turns // 2, tokens // turns // 2)
    page = max(1, min(PAGE_ENTRIES, PAGE_TOKENS // tokens))
    (row,) = build_attempt(record).rows
    counts = [page] * max(1, total // (page * tokens))
    return [pack([row] * count).SerializeToString() for count in counts]


def in_torch(tokens: int, total: int) -> dict[str, float]:
    """The same answers as a TensorDict and through TransferQueue, in the learner environment."""
    with tempfile.NamedTemporaryFile(suffix=".columns") as file:
        for data in packed(1, tokens, total):
            file.write(struct.pack("<I", len(data)) + data)
        file.flush()
        command = [learner_python(), "-m", "benchmarks.batch_tensors", file.name, "6"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(options: argparse.Namespace) -> list[Row]:
    """What a conversation costs by its turns, of 100 + 100 tokens each: stored bytes, CPU to assemble it."""
    turns = (5, 10, 20, 50, 100, 200)
    stored, seconds = [], []
    for count in turns:
        record = conversation(count, 100, 100)
        stored.append(sum(len(call.call.SerializeToString()) for call in read_calls(record.spans)))
        repeats = max(4, int(options.tokens / count / 200))
        seconds.append(min(cpu(record, repeats // 4) for _ in range(4)) / (repeats // 4))
    draw(turns, stored, seconds)
    tokens = [count * 200 for count in turns]
    return [
        figure(
            "conversation of 50 turns, stored bytes a token over those of 5 turns",
            "times",
            (stored[3] / tokens[3]) / (stored[0] / tokens[0]),
            "<= 1.15",
        ),
        figure(
            "conversation of 50 turns, CPU a token over that of 5 turns",
            "times",
            (seconds[3] / tokens[3]) / (seconds[0] / tokens[0]),
            "<= 1.15",
        ),
    ]


def draw(turns: Sequence[int], stored: Sequence[float], seconds: Sequence[float]) -> None:
    """Both costs against turns, with what they would be if every turn held the whole history."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure_, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axis, values, label in (
        (axes[0], stored, "stored bytes"),
        (axes[1], seconds, "s of CPU to assemble"),
    ):
        axis.plot(turns, values, marker="o", label="measured")
        whole = [values[0] * count * (count + 1) / (turns[0] * (turns[0] + 1)) for count in turns]
        axis.plot(turns, whole, linestyle=":", label="turns x tokens")
        axis.set(xlabel="turns of 200 tokens", ylabel=label, xscale="log", yscale="log")
        axis.legend()
    figure_.tight_layout()
    figure_.savefig(PICTURE)
    pyplot.close(figure_)


def measure(options: argparse.Namespace) -> list[Row]:
    """Short rows, long rows, and conversations of more and more turns."""
    rows = []
    for tokens, target in ((64, 1), (4096, 10)):
        count = max(1, int(options.tokens / tokens))
        record = conversation(1, tokens // 2, tokens // 2)
        parsed = min(cpu(record, count) for _ in range(3))
        seconds = min(from_bytes(record, count) for _ in range(3))
        name = f"rows of {tokens:,} tokens"
        for begin, each in (("parsed calls", parsed), ("stored spans", seconds)):
            rate = tokens * count / each / 1e6
            rows.append(figure(f"{name}, {begin} to columns", "million tokens/s", rate))
        torch = in_torch(tokens, options.tokens)
        # A second of one core: parsing, building, packing and converting, one after the other.
        each = seconds / (tokens * count) + torch["tensor_dict"] / torch["tokens"]
        rows.append(
            figure(
                f"{name}, stored spans to TensorDict",
                "million tokens/s",
                1 / each / 1e6,
                f">= {target}",
                peer=torch["tokens"] / torch["queue_wall"] / 1e6,
                peer_name="TransferQueue, put and get of the same TensorDicts, wall clock",
            )
        )
    for turns in (10, 50, 200):
        count = max(1, int(options.tokens / turns / 200))
        rate = turns * 200 * count / cpu(conversation(turns, 100, 100), count) / 1e6
        rows.append(figure(f"conversations of {turns} turns of 200 tokens", "million tokens/s", rate))
    return [*rows, *growth(options)]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, tokens=(1_000_000, "tokens of each measurement")))

"""`agl-grpc rollouts show`: masks, verdicts and the fate of tokens, against a real store."""

from __future__ import annotations

import asyncio
import os

import pytest
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.rollouts import app
from typer.testing import CliRunner

from agl_grpc.client import StoreClient
from agl_grpc.model import Failure, FailureKind, Reward, Span, semconv
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.v1 import model_call_pb2, span_pb2


def call(prompt: list[int], answer: list[int], likely: list[float], number: int) -> span_pb2.Span:
    """A captured model call."""
    choice = model_call_pb2.Choice(
        token_ids=answer,
        logprobs=likely,
        finish_reason="stop",
        policy_runs=[model_call_pb2.PolicyRun(start=0, end=len(answer), policy_version=1)],
    )
    return span_pb2.Span(
        trace_id=b"t" * 16,
        span_id=os.urandom(8),
        name="chat",
        start_time_unix_nano=number,
        end_time_unix_nano=number,
        model_call=model_call_pb2.ModelCall(
            model="m",
            prompt=model_call_pb2.PromptTokens(token_ids=prompt),
            choices=[choice],
            sampling=model_call_pb2.SamplingParameters(temperature=1.0),
            logprob_semantics=model_call_pb2.LOGPROB_SEMANTICS_PROCESSED,
            outcome=model_call_pb2.MODEL_CALL_OUTCOME_COMPLETE,
            engine_id="e",
            mode="train",
        ),
    )


async def _filled(client: StoreClient) -> None:
    rollout = await client.start_rollout(input={"question": "2 + 2"}, rollout_id="shown")
    place = {"rollout_id": "shown", "attempt_id": rollout.attempt.attempt_id}
    spans = [call([1, 2], [3, 4], [-0.1, -5.0], 1), call([1, 2, 3, 4, 9], [5], [-0.2], 2)]
    await client.add_span(Span(**place, name="m", attributes={semconv.MESSAGE_BODY: "it is 4"}))
    await client.append_spans([span_pb2.AttemptSpans(**place, spans=spans)])
    await client.put_rewards(
        [
            Reward(**place, value=0.5),
            Reward(**place, name="j", grader="j", value=1.0, metadata={"reasons": "so \x1b[2J it is"}),
            Reward(**place, name="x", grader="x", failure=Failure(kind=FailureKind.GRADER, message="lost")),
        ]
    )
    await client.update_attempt(place["rollout_id"], place["attempt_id"], "succeeded")


async def test_a_rollout_is_a_page_of_the_terminal() -> None:
    server = await StoreServer.start(ServeConfig(port=0, http_port=None, database=None, grace=1.0))
    try:
        async with StoreClient(server.address) as client:
            await _filled(client)
        shown = await asyncio.to_thread(
            CliRunner().invoke, app, ["show", "shown", "--store", server.address, "--no-colour"]
        )
        assert shown.exception is None, shown.exception
        coloured = await asyncio.to_thread(
            CliRunner().invoke, app, ["show", "shown", "--store", server.address, "--colour"]
        )
        missing = await asyncio.to_thread(
            CliRunner().invoke, app, ["show", "nobody", "--store", server.address]
        )
    finally:
        await server.stop()
    page = shown.stdout
    assert page.startswith("shown  succeeded")
    assert '{"question":"2 + 2"}' in page
    # Prompt plain, sampled in brackets (the unlikely one apart), observed in others.
    assert page.rstrip().endswith("<1><2>⟦<3>⟧⟦<4>⟧«<9>»⟦<5>⟧")
    assert "\nemitted\nit is 4\n" in page
    assert "tokens  3 trained, 3 observed" in page
    assert "reward  primary = 0.5" in page
    assert "reward  j = 1  by j@-" in page
    assert "grader: lost" in page
    assert "\x1b" not in page  # what a judge has written steers no terminal
    assert "\x1b[32m<3>" in coloured.stdout
    assert "\x1b[33m<4>" in coloured.stdout
    assert isinstance(missing.exception, CliError)


@pytest.mark.parametrize("path", ["no/such/folder"])
def test_a_tokenizer_that_is_none_is_one_line(path: str) -> None:
    result = CliRunner().invoke(app, ["show", "r", "--store", "127.0.0.1:1", "--tokenizer", path])
    assert isinstance(result.exception, CliError)

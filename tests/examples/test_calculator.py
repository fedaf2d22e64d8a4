"""The calculator example's parts that need no model: evaluator, tasks, agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agl_grpc
from examples.calculator.agent import agent, solve
from examples.calculator.arithmetic import CalculatorError, calculate
from examples.calculator.tasks import training_tasks, validation_tasks


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 99), min_size=2, max_size=4), st.data())
def test_sums_are_right(numbers: list[int], data: st.DataObject) -> None:
    signs = [data.draw(st.sampled_from([1, -1])) for _ in numbers[1:]]
    text = str(numbers[0]) + "".join(
        f" {'+' if s > 0 else '-'} {n}" for s, n in zip(signs, numbers[1:], strict=True)
    )
    assert calculate(text) == str(numbers[0] + sum(s * n for s, n in zip(signs, numbers[1:], strict=True)))


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "2 ** 99",
        "__import__('os')",
        "1 / 0",
        "x",
        "True",
        "1 +",
        "(" * 60,
        "9" * 65,
        "1e300 * 1e300",
        "'a'",
        "1, 2",
    ],
)
def test_only_arithmetic_is_evaluated(expression: str) -> None:
    with pytest.raises(CalculatorError):
        calculate(expression)


def test_validation_questions_are_held_out() -> None:
    held_out = frozenset(task["question"] for task in validation_tasks())
    assert len(held_out) == 200
    train = training_tasks(3000, 7, held_out)
    assert len(train) == 3000
    assert not held_out & {task["question"] for task in train}
    assert train != training_tasks(3000, 8, held_out)
    for task in train[:50]:
        expression = task["question"].split(": ")[1].removesuffix(" =")
        assert calculate(expression) == task["answer"]


@asynccontextmanager
async def scripted_model(*answers: str) -> AsyncIterator[tuple[agl_grpc.LLM, list[dict[str, Any]]]]:
    """An HTTP endpoint that answers chat completions from a script and keeps the requests."""
    requests: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(int(x.split(":")[1]) for x in head.splitlines() if x.startswith("content-length"))
        requests.append(json.loads(await reader.readexactly(length)))
        message = {"role": "assistant", "content": answers[len(requests) - 1]}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        data = json.dumps({**body, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
            f"Connection: close\r\n\r\n{data}".encode()
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        url = f"http://127.0.0.1:{port}/v1"
        yield agl_grpc.LLM(endpoint=url, model="m", sampling_parameters={"temperature": 0}), requests
    finally:
        server.close()
        await server.wait_closed()


async def test_the_agent_uses_the_calculator_and_answers() -> None:
    task = {"question": "What is 12 + 30?", "answer": "42"}
    async with scripted_model("<calc>12 + 30</calc>", "Answer: 42") as (llm, requests):
        assert await agent(task, llm) == 1.0
    assert requests[0]["messages"] == [{"role": "user", "content": "What is 12 + 30?"}]
    assert requests[0]["temperature"] == 0
    assert [m["role"] for m in requests[1]["messages"]] == ["user", "assistant", "tool"]
    assert requests[1]["messages"][2]["content"] == "42"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Answer: -7"], "-7"),
        (["Answer: 007"], "7"),
        (["seven"], None),
        (["<calc>1 +</calc>", "Answer: 1"], "1"),
        (["<calc>1</calc>"] * 3, None),
    ],
)
async def test_final_answers(answers: list[str], expected: str | None) -> None:
    async with scripted_model(*answers) as (llm, requests):
        assert await solve("?", llm) == expected
        assert len(requests) == len(answers)

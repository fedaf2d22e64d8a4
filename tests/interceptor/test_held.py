"""An answer inside the engine: what passes at once, what waits, and what its records get."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agl_grpc.interceptor.attempts import KnownAttempt
from agl_grpc.interceptor.attribution import Attribution, CallContext
from agl_grpc.interceptor.capture.record import (
    CallRecord,
    ChoiceRecord,
    EngineIdentity,
    note_experts,
    to_span,
)
from agl_grpc.interceptor.inside.held import HeldAnswer
from agl_grpc.interceptor.inside.runtime import Interceptor, WeightLine
from agl_grpc.interceptor.inside.sampling import capture_params
from agl_grpc.interceptor.inside.swap import RunningCalls, SwapError, WeightSwapper
from agl_grpc.interceptor.refusals import Refusal
from agl_grpc.interceptor.sampling import sampling_message
from agl_grpc.interceptor.settings import Settings
from agl_grpc.model.resource import ProxyLLM
from agl_grpc.v1 import model_call_pb2
from tests.support.waiting import eventually


class Client:
    """What an ASGI server is to an application; `durable` are the futures of the records."""

    def __init__(self, keep_raw: bool = True) -> None:
        self.sent: list[bytes] = []
        self.records: list[CallRecord] = []
        self.durable: list[asyncio.Future[None]] = []
        self.answer = HeldAnswer(self.request, self.take, path="/v1/x", tries=0, keep_raw=keep_raw)

    async def request(self) -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"a": 1}', "more_body": False}

    async def take(self, message: Any) -> None:
        self.sent.append(message.get("body", b"head"))

    def submit(self, record: CallRecord) -> asyncio.Future[None]:
        self.records.append(record)
        self.durable.append(asyncio.get_running_loop().create_future())
        return self.durable[-1]

    async def body(self, data: bytes, *, more: bool = True) -> None:
        await self.answer.send({"type": "http.response.body", "body": data, "more_body": more})


def record() -> CallRecord:
    context = CallContext(Attribution("ro", "at"), "completions")
    return CallRecord(context, "r", "tiny", model_call_pb2.SamplingParameters())


HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream; x")]}


async def test_a_stream_passes_and_its_end_waits_for_the_disk() -> None:
    client = Client()
    await client.answer.receive()
    client.answer.begun()
    await client.answer.send(HEAD)
    await client.body(b"one")
    assert client.sent == [b"head", b"one"]
    client.answer.ended(record(), client.submit)
    await client.body(b"two")
    end = asyncio.create_task(client.body(b"", more=False))
    await eventually(lambda: client.durable, what="the record's way to disk")
    assert client.sent == [b"head", b"one"]
    client.durable[0].set_result(None)
    await end
    assert client.sent == [b"head", b"one", b"two", b""]
    (kept,) = client.records
    assert kept.raw_request is not None
    assert kept.raw_response is not None
    assert (kept.raw_request.data, kept.raw_response.data) == (b'{"a": 1}', b"onetwo")
    assert kept.raw_response.media_type == "text/event-stream"


async def test_an_answer_goes_on_while_another_call_of_its_request_runs() -> None:
    client = Client(keep_raw=False)
    client.answer.begun()
    client.answer.ended(record(), client.submit)
    await client.body(b"held")
    assert client.sent == []
    client.answer.begun()
    await client.body(b"more")
    assert client.sent == [b"held", b"more"]
    client.answer.abandoned()
    client.answer.close()
    assert len(client.records) == 1
    assert client.records[0].raw_request is None
    # An engine may end a call only after its client has left.
    client.answer.ended(record(), client.submit)
    assert len(client.records) == 2


async def test_new_calls_wait_or_are_refused_while_weights_are_loaded() -> None:
    class Attempts:
        async def admit(self, attribution: Attribution) -> KnownAttempt | None:
            return None

    for on_swap in ("wait", "refuse"):
        interceptor = object.__new__(Interceptor)
        interceptor._settings = Settings("store", on_swap=on_swap)
        interceptor._attempts = Attempts()  # type: ignore[assignment]  # knows nothing
        swapper = WeightSwapper(None, None, "engine", None)  # type: ignore[arg-type]  # only its state
        interceptor._lines = [WeightLine(None, swapper)]  # type: ignore[arg-type]  # follows nothing
        swapper.swapped.clear()  # in the middle
        if on_swap == "wait":
            waiting = asyncio.create_task(interceptor.admit(Attribution("ro", "at")))
            await asyncio.sleep(0)
            assert not waiting.done()
            swapper.swapped.set()
            assert await waiting is None
            continue
        with pytest.raises(Refusal, match="new weights") as refused:
            await interceptor.admit(Attribution("ro", "at"))
        assert (refused.value.status, refused.value.headers()) == (429, {"retry-after": "1"})
        swapper.swapped.set()
        assert await interceptor.admit(Attribution("ro", "at")) is None


async def test_an_engine_that_does_not_pause_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agl_grpc.interceptor.inside.swap._RPC_TIMEOUT", 0.05)
    resumed = 0

    class Hanging:
        async def pause_generation(self, **_: Any) -> None:
            await asyncio.Event().wait()

        async def resume_generation(self) -> None:
            nonlocal resumed
            resumed += 1

    swapper = WeightSwapper(Hanging(), None, "engine", None)  # type: ignore[arg-type]  # not reached
    with pytest.raises(SwapError, match="did not pause within"):
        await swapper._swap(None)  # type: ignore[arg-type]  # not reached
    assert (resumed, swapper.swapping) == (1, False)


async def test_calls_that_do_not_finish_in_time_keep_the_old_weights() -> None:
    class Wrapper:
        async def drained(self, limit: float, adapter: str) -> bool:
            return False

        def under_way(self, adapter: str) -> int:
            return 3

    running = RunningCalls(Wrapper(), "finish", 0.5)  # type: ignore[arg-type]  # all that is asked of it
    # The engine client is None: it is not even paused.
    swapper = WeightSwapper(None, None, "engine", None, None, running)  # type: ignore[arg-type]  # not reached
    with pytest.raises(SwapError, match=r"3 calls still ran after 0\.5 s"):
        await swapper._swap(None)  # type: ignore[arg-type]  # not reached
    assert not swapper.swapping


def test_the_resource_imposes_its_sampling_and_what_was_asked_for_is_kept() -> None:
    asked = SimpleNamespace(
        temperature=0.3, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, max_tokens=100, seed=None, n=1, logprobs=None, extra_args=None,
    )  # fmt: skip
    llm = ProxyLLM(
        endpoint="http://x",
        model="tiny",
        sampling_parameters={"temperature": 1.0, "max_tokens": 500, "stop": "x", "val": {"temperature": 0}},
    )
    known = KnownAttempt(resources={"main": llm})
    train = capture_params(asked, known.sampling("tiny", "train"))
    assert (train.temperature, train.max_tokens, train.logprobs) == (1.0, 100, 0)
    assert not hasattr(train, "stop")
    assert capture_params(asked, known.sampling("tiny", "val")).temperature == 0
    said = {pair.key: pair.value.double_value for pair in sampling_message(train, asked).other}
    assert said == {"requested.temperature": 0.3}
    assert asked.temperature == 0.3


def test_routed_experts_are_kept_with_their_shape() -> None:
    made, experts = record(), np.arange(24, dtype=np.int16).reshape(3, 4, 2)
    choice = made.choices[0] = ChoiceRecord(0)
    note_experts(made, choice, None)
    note_experts(made, choice, experts)
    call = to_span(made, EngineIdentity("e", "vllm", "tiny", True)).model_call
    assert call.choices[0].routed_experts == experts.tobytes()
    assert [(n.key, n.value.string_value) for n in call.sampling.other] == [
        ("routed_experts.0", "3x4x2 int16")
    ]
    huge = SimpleNamespace(nbytes=3 * 2**20)
    note_experts(made, choice, huge)
    assert "not kept" in made.notes[-1].value.string_value

"""The interceptor's pure parts: attribution, versions, deltas, vLLM's arguments and environment."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest

from agl_grpc.interceptor.attribution import (
    CURRENT,
    api_of,
    attribution_of_credential,
    parse_path,
    parse_traceparent,
)
from agl_grpc.interceptor.capture.deltas import PromptDeltas
from agl_grpc.interceptor.capture.versions import (
    ServedWeights,
    VersionRun,
    runs_from_engine,
    runs_from_starts,
)
from agl_grpc.interceptor.inside.middleware import AttributionMiddleware, Message, Receive, Scope, Send
from agl_grpc.interceptor.inside.serve import (
    MIDDLEWARE,
    ServeError,
    adapter_arguments,
    check_model,
    cpu_arguments,
    engine_arguments,
    set_environment,
)
from agl_grpc.interceptor.settings import Settings


def test_base_urls() -> None:
    found = parse_path("/rollout/ro-1/attempt/at%2F2/v1/chat/completions")
    assert found is not None
    assert (found[0].rollout_id, found[0].attempt_id, found[0].mode) == ("ro-1", "at/2", "train")
    assert found[1] == "/v1/chat/completions"
    found = parse_path("/rollout/r/attempt/a/agent/judge/mode/val/notrain/v1/messages")
    assert found is not None
    assert (found[0].agent_name, found[0].mode, found[0].notrain) == ("judge", "val", True)
    assert parse_path("/v1/chat/completions") is None
    assert parse_path("/rollout/r/v1/models") is None


def test_only_inference_paths_have_a_dialect() -> None:
    assert api_of("/v1/responses/resp_1/cancel") == "responses"
    assert api_of("/inference/v1/generate") == "generate"
    for path in ("/metrics", "/v1/load_lora_adapter", "/v1/responses/a/b/c", "/inference/v1/abort_requests"):
        assert api_of(path) is None


def test_an_attempt_credential_names_its_attempt_and_other_keys_do_not() -> None:
    claims = base64.urlsafe_b64encode(json.dumps(["run", "ro-1", "at-1", 99]).encode()).rstrip(b"=").decode()
    found = attribution_of_credential(f"agl1.{claims}.c2ln")
    assert found is not None
    assert (found.rollout_id, found.attempt_id) == ("ro-1", "at-1")
    for key in ("", "EMPTY", "sk-abc", "agl1.x", "agl1.!!!.c2ln", "agl1.e30.c2ln", "agl1.WzEsMiwzLDRd.c2ln"):
        assert attribution_of_credential(key) is None


def test_traceparent() -> None:
    trace, parent = parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert (trace.hex(), parent.hex()) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    for bad in ("", "00-xyz", f"00-{'0' * 32}-{'1' * 16}-01"):
        assert parse_traceparent(bad) == (b"", b"")


def test_runs_cover_all_tokens_without_gaps() -> None:
    assert runs_from_starts([(3, 0)], 5) == [VersionRun(0, 5, 3)]
    assert runs_from_starts([(3, 0), (4, 2), (5, 2), (6, 5)], 5) == [VersionRun(0, 2, 3), VersionRun(2, 5, 5)]
    assert runs_from_starts([(3, 0), (3, 2)], 4) == [VersionRun(0, 4, 3)]
    assert runs_from_starts([(3, 0)], 0) == []
    assert runs_from_engine([("0", 0), ("7", 4)], 6) == [VersionRun(0, 4, 0), VersionRun(4, 6, 7)]
    assert runs_from_engine([("default", 0)], 6) is None


def test_every_adapter_has_its_own_version_and_vllm_is_told_none() -> None:
    alone = ServedWeights("base", 3)
    assert (alone.of("base"), alone.of("somebody's"), alone.label()) == ((3, ""), (3, ""), "3")
    served = ServedWeights("base", 0, ["planner", "solver"])
    served.change("solver", 2, "sha256:s")
    assert [served.of(name) for name in ("base", "planner", "solver")] == [(0, ""), (0, ""), (2, "sha256:s")]
    # No number: vLLM's account of a sequence's versions, which would be every adapter's, is left out.
    assert runs_from_engine([(served.label(), 0)], 4) is None


def test_arguments_for_adapters(tmp_path: Path) -> None:
    assert adapter_arguments({}, tmp_path, ["--port", "1"]) == ([], [])
    trained = tmp_path / "trained"
    trained.mkdir()
    with pytest.raises(ServeError, match=r"no adapter_config\.json"):
        adapter_arguments({"planner": str(trained)}, tmp_path, [])
    (trained / "adapter_config.json").write_text("{}")
    arguments, names = adapter_arguments({"planner": str(trained), "a/b": ""}, tmp_path, [])
    assert names == ["planner", "a/b"]
    number = arguments.index("--lora-modules")
    assert arguments[:number] == ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2"]
    assert arguments[number + 1 :] == [f"planner={trained}", f"a/b={tmp_path / 'a%2Fb'}"]
    # What begins as the model is has tensors that say nothing, in the format's own terms.
    data = (tmp_path / "a%2Fb" / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert [tensor["shape"] for tensor in header.values()] == [[1, 1], [1, 1]]
    assert data[8 + size :] == bytes(8)
    with pytest.raises(ServeError, match="instead of --lora-modules"):
        adapter_arguments({"a": ""}, tmp_path, ["--lora-modules", "x=y"])
    with pytest.raises(ServeError, match="cannot be named 'a,b'"):
        adapter_arguments({"a,b": ""}, tmp_path, [])


def test_deltas_always_rebuild_the_prompt() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    deltas = PromptDeltas(max_tokens=3000)
    stored: dict[bytes, tuple[list[int], dict[int, list[int]]]] = {}
    saved = 0
    for number in range(300):
        attempt = ("ro", f"at-{generator.randrange(4)}")
        prompt = [generator.randrange(9) for _ in range(20)]
        if stored and generator.random() < 0.8:
            base_prompt, base_responses = generator.choice(list(stored.values()))
            sequence = base_prompt + generator.choice(list(base_responses.values()))
            prompt = sequence[: generator.randrange(len(sequence) + 1)] + prompt
        encoded = deltas.encode(attempt, prompt)
        rebuilt = list(encoded.token_ids)
        if encoded.base_span_id:
            base_prompt, base_responses = stored[encoded.base_span_id]
            whole = base_prompt + base_responses[encoded.base_choice]
            rebuilt = whole[: encoded.base_length] + rebuilt
            saved += encoded.base_length
        assert rebuilt == prompt
        span_id = number.to_bytes(8, "big")
        responses = {index: [generator.randrange(9) for _ in range(5)] for index in range(2)}
        stored[span_id] = (prompt, responses)
        deltas.remember(attempt, span_id, prompt, responses)
        assert deltas._tokens <= 3000 + 2 * len(prompt) + 10 or len(deltas._bases) == 1
    assert saved > 200


def test_a_prompt_builds_on_the_call_that_shares_most_with_it() -> None:
    deltas = PromptDeltas()
    for number, shared in enumerate([3, 30, 12, 29, 8]):
        deltas.remember(("ro", "at"), b"%08d" % number, [*range(shared), 1000 + number], {0: [7, 7]})
    most = deltas.encode(("ro", "at"), range(40))
    assert (most.base_span_id, most.base_length, list(most.token_ids)) == (b"00000001", 30, [*range(30, 40)])
    whole = deltas.encode(("ro", "at"), range(1000, 1040))
    assert (whole.base_span_id, list(whole.token_ids)) == (b"", [*range(1000, 1040)])


def test_vllms_arguments_are_passed_on_and_ours_give_way() -> None:
    given = ["--port", "1", "--max_model_len=512", "--generation-config", "auto", "--host", "0.0.0.0"]
    arguments = engine_arguments("m", given)
    assert arguments[-len(given) :] == given
    assert arguments.count("--generation-config") == 1
    assert arguments.count("--host") == 1
    assert arguments[arguments.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert arguments[arguments.index("--middleware") + 1] == MIDDLEWARE
    assert "--logprobs-mode" not in engine_arguments("m", given, train=False)
    with pytest.raises(ServeError, match="--worker-extension-cls is taken"):
        engine_arguments("m", ["--worker-extension-cls=x"])
    with pytest.raises(ServeError, match="--api-server-count must be 1"):
        engine_arguments("m", ["--api-server-count", "2"])
    assert engine_arguments("m", ["--api-server-count", "1"])


def test_the_environment_keeps_what_is_set_and_adds_to_the_plugins() -> None:
    settings = Settings(store="h:1", engine_id="e", temperature=0.5, spool_bytes=7)
    environment = {"VLLM_PLUGINS": "mine,other", "VLLM_CPU_KVCACHE_SPACE": "9"}
    set_environment(environment, settings, cpu=True, cores=2)
    assert environment["VLLM_PLUGINS"] == "mine,other,agl_grpc"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert environment["TORCHDYNAMO_DISABLE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert Settings.from_environment(environment) == settings
    assert Settings.from_environment({}) is None
    on_gpu: dict[str, str] = {}
    set_environment(on_gpu, settings, cpu=False, cores=64)
    assert "TORCHDYNAMO_DISABLE" not in on_gpu
    assert "agl_grpc" in on_gpu["VLLM_PLUGINS"].split(",")


def test_a_cpu_neither_compiles_nor_computes_in_another_precision_than_its_learner() -> None:
    environment = {"TORCHDYNAMO_DISABLE": "1"}
    assert cpu_arguments(environment, ["--seed", "1"]) == ["--enforce-eager", "--dtype", "float32"]
    assert cpu_arguments(environment, ["--enforce-eager", "--dtype=bfloat16"]) == []
    assert cpu_arguments({"TORCHDYNAMO_DISABLE": "0"}, ["--no-enforce-eager"], train=False) == []
    with pytest.raises(ServeError, match="set TORCHDYNAMO_DISABLE=0"):
        cpu_arguments(environment, ["--no-enforce-eager"])


def test_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="does not exist"):
        check_model(str(tmp_path / "missing"), offline=False)
    with pytest.raises(ServeError, match=r"no config\.json"):
        check_model(str(tmp_path), offline=False)
    with pytest.raises(ServeError, match="HF_HUB_OFFLINE"):
        check_model("Qwen/Qwen2.5-0.5B", offline=True)
    check_model("Qwen/Qwen2.5-0.5B", offline=False)
    (tmp_path / "config.json").write_text("{}")
    check_model(str(tmp_path), offline=True)


async def test_the_agents_key_is_replaced_by_the_engines() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        context = CURRENT.get()
        assert context is not None
        assert context.attribution.credential == "agents-key"

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    class Keyed(AttributionMiddleware):
        engine_key = "engines-key"

    path = "/rollout/r/attempt/a/v1/chat/completions"
    headers = [(b"authorization", b"Bearer agents-key"), (b"x-other", b"1")]
    scope = {"type": "http", "path": path, "raw_path": path.encode(), "headers": headers}
    await Keyed(app)(scope, receive, send)
    assert seen[0]["path"] == "/v1/chat/completions"
    assert dict(seen[0]["headers"]) == {b"authorization": b"Bearer engines-key", b"x-other": b"1"}
    assert CURRENT.get() is None

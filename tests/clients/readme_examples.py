"""The agents that the clients' READMEs show, built as a user of the package builds them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from agl_grpc.v1 import common_pb2, resources_pb2, rollout_pb2, run_pb2, store_service_pb2_grpc
from agl_grpc.v1 import store_service_pb2 as pb
from tests.conformance.languages import CPP, CPP_BUILD, GO, LANGUAGES, ROOT, run
from tests.support.scripted_model import ScriptedModel
from tests.support.store_process import StoreProcess

_RUN = "my-run"  # as the READMEs name it
_PLACE = "127.0.0.1:4747"


def shown(language: str, fence: str, address: str) -> str:
    """The first example of a README, for a store at another address."""
    readme = (LANGUAGES[language].folder / "README.md").read_text()
    found = re.search(rf"^## An agent\n\n```{fence}\n(.*?)^```", readme, re.M | re.S)
    assert found is not None
    assert found[1].count(_PLACE) == 1
    return found[1].replace(_PLACE, address)


def works(folder: Path, command: Sequence[str], store: StoreProcess) -> None:
    """Lets an agent that is started so work on a task, with a model that knows the answer, until SIGTERM."""
    answering = ScriptedModel(lambda _model, _question: "It is 2.")
    with answering as model, grpc.insecure_channel(store.address) as channel:
        stub = store_service_pb2_grpc.StoreServiceStub(channel)
        stub.CreateRun(pb.CreateRunRequest(run=run_pb2.Run(run_id=_RUN)))
        llm = resources_pb2.LLM(endpoint=model.endpoint, model="m")
        resource = resources_pb2.Resource(name="main", llm=llm)
        stub.PublishResources(pb.PublishResourcesRequest(run_id=_RUN, resources=[resource]))
        task = rollout_pb2.RolloutSpec(input=common_pb2.Payload(data=b'{"question": "1+1", "answer": "2"}'))
        (made,) = stub.EnqueueRollouts(pb.EnqueueRolloutsRequest(run_id=_RUN, rollouts=[task])).rollouts
        with subprocess.Popen(command, cwd=folder) as agent:
            waiting = pb.WaitRolloutsRequest(rollout_ids=[made.rollout_id])
            waiting.timeout.FromSeconds(50)
            done = stub.WaitRollouts(waiting, timeout=60).rollouts
            agent.terminate()
            assert agent.wait(30) == 0
        assert [one.status for one in done] == [rollout_pb2.ROLLOUT_STATUS_SUCCEEDED]
        (reward,) = stub.ListRewards(pb.ListRewardsRequest(rollout_ids=[made.rollout_id])).rewards
    assert (reward.name, reward.value) == ("primary", 1.0)


def typescript(folder: Path, address: str) -> Sequence[str]:
    """The package as `npm pack` makes it, installed into an empty folder; the command that runs the agent."""
    client = LANGUAGES["typescript"].folder
    run(("npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder)), client)
    (folder / "package.json").write_text('{"name": "user", "private": true, "type": "module"}\n')
    (package,) = folder.glob("*.tgz")
    install = ("npm", "install", "--no-audit", "--no-fund", "--prefer-offline", "--silent")
    run((*install, f"./{package.name}", "openai@^6"), folder)
    (folder / "agent.ts").write_text(shown("typescript", "ts", address))
    compiler = str(client / "node_modules" / ".bin" / "tsc")
    options = ("--strict", "--target", "es2022", "--module", "nodenext", "--skipLibCheck")
    run((compiler, *options, "agent.ts"), folder)
    return ("node", "agent.js")


def go(folder: Path, address: str) -> Sequence[str]:
    """The agent with its imports and a function that calls the model; the command that runs it."""
    body = shown("go", "go", address)
    (folder / "main.go").write_text(_GO.replace("// BODY", body))
    run((GO, "build", "-o", str(folder / "agent"), str(folder / "main.go")), folder)
    return (str(folder / "agent"),)


def cpp(folder: Path, address: str) -> Mapping[str, Sequence[str]]:
    """The agent and the example program, with the client as it is installed; the commands that run them."""
    run(("cmake", "--install", str(CPP_BUILD), "--prefix", str(folder / "there")), ROOT)
    (folder / "CMakeLists.txt").write_text(_CMAKE)
    example = LANGUAGES["cpp"].folder / "examples" / "greeter.cc"
    (folder / "greeter.cc").write_text(example.read_text())
    (folder / "agent.cc").write_text(_CPP + shown("cpp", "cpp", address))
    run((CPP, "cmake", "-B", "build", f"-Dagl_grpc_ROOT={folder / 'there'}"), folder)
    run((CPP, "cmake", "--build", "build", "-j", "2"), folder)
    return {name: (CPP, f"build/{name}") for name in ("agent", "greeter")}


_CMAKE = """cmake_minimum_required(VERSION 3.16)
project(user CXX)
find_package(agl_grpc REQUIRED)
foreach(name agent greeter)
  add_executable(${name} ${name}.cc)
  target_link_libraries(${name} PRIVATE agl_grpc::agl_grpc)
endforeach()
"""

# What the README leaves to the user: how to call a model, and how to score its answer.
_CPP = """#include <string>
std::string chat(const std::string& url, const std::string&, const std::string&, const std::string& task) {
  return url.rfind("http://127.0.0.1:", 0) == 0 ? task : std::string();
}
double score(const std::string& reply) { return reply.find("1+1") == std::string::npos ? 0 : 1; }
"""

_GO = """package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"strings"

	agl "github.com/agl-grpc/agl-grpc/clients/go"
)

func chat(ctx context.Context, url, key, question string) (string, error) {
	message := map[string]string{"role": "user", "content": question}
	body, _ := json.Marshal(map[string]interface{}{"model": "m", "messages": []interface{}{message}})
	request, err := http.NewRequestWithContext(ctx, "POST", url+"/chat/completions", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	request.Header.Set("Authorization", "Bearer "+key)
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	var reply struct {
		Choices []struct{ Message struct{ Content string } }
	}
	if err := json.NewDecoder(answer.Body).Decode(&reply); err != nil || len(reply.Choices) == 0 {
		return "", fmt.Errorf("no answer: %v", err)
	}
	return reply.Choices[0].Message.Content, nil
}

func score(reply, answer string) float64 {
	if strings.Contains(reply, answer) {
		return 1
	}
	return 0
}

func main() {
	ctx := context.Background()
// BODY
	if err != nil {
		log.Fatal(err)
	}
}
"""

"""Each rollout as a Job: against a stateful fake of the API server, as no cluster runs here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agl_grpc import Trainer
from agl_grpc.client import StoreClient
from agl_grpc.model import FailureKind, ProxyLLM, Rollout, RolloutConfig, RolloutStatus
from agl_grpc.runner import LoadError
from agl_grpc.runner.job_template import load_template, make_job, make_secret
from tests.runner.kube_api import FakeCluster
from tests.runner.runner_process import RunnerProcess
from tests.support.store_process import StoreProcess
from tests.support.waiting import eventually
from tests.trainer.agents import summing

LONG = 90.0

AGENT = """
import json, os, sys, time
task = json.load(open(os.environ["AGL_GRPC_TASK_FILE"]))
(llm,) = json.load(open(os.environ["AGL_GRPC_RESOURCES_FILE"])).values()
print(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"][:5], llm["model"])
time.sleep(task.get("sleep", 0))
open(os.environ["AGL_GRPC_REWARD_FILE"], "w").write(json.dumps(task.get("reward")))
sys.exit(task.get("exit", 0))
"""

Start = Callable[..., RunnerProcess]


def template(folder: Path) -> Path:
    """A template on the test's agent."""
    (folder / "agent.py").write_text(AGENT)
    container = {"name": "agent", "image": "i", "command": [sys.executable, str(folder / "agent.py")]}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "spec": {"template": {"spec": {"containers": [container]}}},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture
def cluster(folder: Path) -> Iterator[FakeCluster]:
    """An API server of the test's own."""
    with FakeCluster(folder) as opened:
        yield opened


@pytest.fixture
def start(
    store: StoreProcess,
    run_id: str,
    folder: Path,
    cluster: FakeCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> Start:
    """Starts a runner whose rollouts are Jobs."""
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig()))

    def run() -> RunnerProcess:
        options = ("--run", run_id, "--job-template", str(template(folder)), "--concurrency", "4")
        return RunnerProcess(store.address, None, folder, *options)

    return run


async def done(client: StoreClient, *rollouts: Rollout) -> list[Rollout]:
    """Waits until the rollouts have ended; in the order given."""
    ids = [rollout.rollout_id for rollout in rollouts]
    found = await client.wait_for_rollouts(rollout_ids=ids, timeout=LONG)
    return sorted(found, key=lambda rollout: ids.index(rollout.rollout_id))


async def test_each_rollout_is_a_job(client: StoreClient, start: Start, cluster: FakeCluster) -> None:
    await client.add_resources({"llm": ProxyLLM(endpoint="http://127.0.0.1:9/v1", model="m")})
    # The API is overloaded at first: calls are tried again.
    refusals = iter([429, 503])
    cluster.refuse = lambda method, path: next(refusals, None) if method == "POST" else None
    with start():
        tasks: list[dict[str, Any]] = [{"reward": 0.5}, {"reward": {"primary": 1, "style": 2}}, {"exit": 3}]
        good, named, bad = await done(client, *[await client.enqueue_rollout(task) for task in tasks])
        assert [one.status.value for one in (good, named, bad)] == ["succeeded", "succeeded", "failed"]
        rewards = await client.query_rewards([good.rollout_id, named.rollout_id])
        assert {(one.name, one.value) for one in rewards} == {
            ("primary", 0.5),
            ("primary", 1.0),
            ("style", 2.0),
        }
        assert bad.failure is not None
        assert (bad.failure.kind, bad.failure.type) == (FailureKind.AGENT, "exit code 3")
        attempt = await client.get_latest_attempt(good.rollout_id)
        assert attempt is not None
        assert attempt.metadata is not None
        output = json.loads(attempt.metadata["output"])
        url = f"http://127.0.0.1:9/rollout/{good.rollout_id}/attempt/{attempt.attempt_id}/v1"
        assert output["output_tail"].split() == [url, "agl1.", "m"]
        assert (output["node"], output["exit_code"]) == ("node-1", 0)
        await eventually(lambda: not _left(cluster), within=LONG, what="nothing is left in the cluster")


def _left(cluster: FakeCluster) -> list[str]:
    return cluster.names("jobs") + cluster.names("pods") + cluster.names("secrets")


FATES = {
    "image": (FailureKind.INFRASTRUCTURE, "the pod ended: ImagePullBackOff, no such image"),
    "evicted": (FailureKind.INFRASTRUCTURE, "the pod ended: Evicted, the node was low on memory"),
    "oom": (FailureKind.ENVIRONMENT, "it needed more memory than its limit"),
    "no pod": (FailureKind.INFRASTRUCTURE, "the Job failed: BackoffLimitExceeded, m"),
    # Whether the watch saw the pod at all is a matter of luck.
    "deleted": (FailureKind.INFRASTRUCTURE, "the pod ended: it was deleted|the Job failed: Backoff"),
}


async def test_why_a_pod_failed_is_recorded(client: StoreClient, start: Start, cluster: FakeCluster) -> None:
    config = RolloutConfig(max_redeliveries=0)
    with start():
        for fate, (kind, message) in FATES.items():
            cluster.fate = fate
            (ended,) = await done(client, await client.enqueue_rollout({}, config=config))
            assert ended.failure is not None
            assert ended.failure.kind is kind
            assert re.search(message, ended.failure.message)
        await eventually(lambda: not _left(cluster), within=LONG, what="nothing is left in the cluster")


async def test_a_cancelled_rollouts_job_is_deleted(
    client: StoreClient, start: Start, cluster: FakeCluster
) -> None:
    await client.add_resources({"llm": ProxyLLM(endpoint="http://127.0.0.1:9/v1", model="m")})
    with start() as runner:
        rollout = await client.enqueue_rollout({"sleep": 600})
        await eventually(lambda: cluster.processes, within=LONG, what="the pod runs")
        # The watch's position is forgotten, as servers do: the worker lists anew.
        cluster.compacted = cluster.version + 1
        await client.cancel_rollouts([rollout.rollout_id])
        await eventually(lambda: not _left(cluster), within=LONG, what="nothing is left in the cluster")
        cluster.compacted = 0
        (after,) = await done(client, await client.enqueue_rollout({"reward": 1}))
        assert after.status is RolloutStatus.SUCCEEDED, after.failure
        # A worker that is killed leaves a Job; its successor deletes it.
        await client.enqueue_rollout({"sleep": 600}, config=RolloutConfig(max_redeliveries=0))
        await eventually(lambda: cluster.names("jobs"), within=LONG, what="the Job is there")
        runner.workers()[0].kill()
        (again,) = await done(client, await client.enqueue_rollout({"reward": 1}))
        assert again.status is RolloutStatus.SUCCEEDED, again.failure
        await eventually(lambda: not _left(cluster), within=LONG, what="nothing is left in the cluster")


def test_a_trainers_rollouts_are_jobs(
    cluster: FakeCluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig()))
    trainer = Trainer(
        algorithm=summing,
        llm_proxy={"endpoint": "http://127.0.0.1:9/v1", "model": "m"},
        runner={"job_template": str(template(folder)), "concurrency": 2},
        run_name="jobs",
        run_dir=tmp_path,
    )
    assert trainer.fit(train_dataset=[{"reward": 0.5}, {"reward": 2}]).value == 2.5
    assert sum("POST" in line and "/jobs" in line for line in cluster.seen) == 2
    assert not _left(cluster)


def test_jobs_and_secrets_are_valid(tmp_path: Path) -> None:
    job = make_job(load_template(str(template(tmp_path))), "at-1", "host/w 1", {"A": "b"}, 2.5)
    secret = make_secret("at-1", "uid", {"A": "b"}, b"task", b"{}")
    for document in (job, secret):
        kubernetes_validate.validate(document, "1.33", strict=True)
    assert job["spec"]["activeDeadlineSeconds"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("a: [", "is no YAML"),
        ("kind: Pod", "must be one object of kind Job"),
        ("kind: Job\nspec: {template: {spec: {containers: []}}}", "has no container"),
    ],
)
def test_templates_are_checked(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LoadError, match=message):
        load_template(str(path))

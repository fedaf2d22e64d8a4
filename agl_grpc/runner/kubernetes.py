"""Isolation `kubernetes`: each attempt is a Job, made from a template, watched and cleaned up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from agl_grpc.model import FailureKind, NamedResources
from agl_grpc.runner.job_template import (
    ATTEMPT_LABEL,
    WORKER_LABEL,
    agent_container,
    load_template,
    make_job,
    make_secret,
    object_name,
    worker_digest,
)
from agl_grpc.runner.load import LoadError
from agl_grpc.runner.outcome import Outcome
from agl_grpc.runner.program import (
    TAIL_BYTES,
    ProgramAgent,
    failed,
    outcome_of,
    resources_bytes,
    task_bytes,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_BYTES = 1000 * 1000
"""Largest task with its resources: what a Secret holds."""

_TAIL_LINES = 400
_TRIES = 6
_FIRST_WAIT_SECONDS = 0.2
_WATCH_SECONDS = 300
_JOB_SECONDS = 1.0
# What a container waits for that will never come.
_HOPELESS = frozenset(
    {
        "CreateContainerConfigError", "CreateContainerError", "ErrImageNeverPull", "ErrImagePull",
        "ImagePullBackOff", "InvalidImageName",
    }
)  # fmt: skip
# Ends that the cluster caused; another node may do better.
_CLUSTERS_DOING = frozenset({"Evicted", "NodeLost", "NodeShutdown", "Preempting", "Shutdown", "Terminated"})


class KubernetesAgent(ProgramAgent):
    """Runs each attempt as a Job of `template`, in `namespace` (None = that of the configuration).

    The cluster is that of the pod that this runs in, else of KUBECONFIG. Task, resources and credential lie
    in a Secret that belongs to the Job. Both are deleted at the attempt's end, however it ends.

    Raises:
        LoadError: the template or the cluster's configuration cannot be used.
    """

    def __init__(self, template: str, namespace: str | None, store: str) -> None:
        super().__init__(store)
        self._kube = _import_lightkube()
        self._template = load_template(template)
        self._container = agent_container(self._template)
        try:
            self._cluster = self._kube.KubeConfig.from_env().get()
        except self._kube.ConfigError as error:
            raise LoadError(f"there is no cluster to use: {error}; set KUBECONFIG") from error
        self._namespace = namespace
        self._client: Any = None
        self._watches: list[asyncio.Task[None]] = []
        self._ends: dict[str, asyncio.Future[Any]] = {}  # the pod, or the Job where there is none
        self._cleaning: set[str] = set()

    async def rollout_async(self, task: Any, resources: NamedResources, rollout: Any) -> Any:
        """Runs the Job to its end; cancelled, it deletes the Job."""
        attempt_id = rollout.attempt.attempt_id
        files = (task_bytes(task), resources_bytes(resources))
        if (size := sum(map(len, files))) > MOST_BYTES:
            message = f"task and resources have {size} bytes; a Secret holds no more than {MOST_BYTES}"
            return failed("TaskTooLarge", message, {}, FailureKind.ENVIRONMENT)
        self._connect()
        end: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._ends[attempt_id] = end
        try:
            variables = self.environment(resources, rollout)
            limit = rollout.config.timeout_seconds
            job = make_job(self._template, attempt_id, self.runner.worker_id, variables, limit)
            made = await self._create(self._kube.Job.from_dict(job))
            secret = make_secret(attempt_id, made.metadata.uid, variables, *files)
            await self._create(self._kube.Secret.from_dict(secret))
            ended = await end
            if isinstance(ended, self._kube.Job):
                return _without_pod(ended)
            return await self._outcome(ended)
        except (self._kube.ApiError, self._kube.HTTPError) as error:
            message = f"the cluster's API refused: {error}"
            return failed(type(error).__name__, message, {}, FailureKind.INFRASTRUCTURE)
        finally:
            cleaning = asyncio.ensure_future(self._clean_up(object_name(attempt_id)))
            del self._ends[attempt_id]
            await asyncio.shield(cleaning)

    async def close(self) -> None:
        """Ends the watches and the connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    def _connect(self) -> None:
        if self._client is None:
            self._client = self._kube.AsyncClient(self._cluster, namespace=self._namespace)
            self._watches = [
                asyncio.create_task(self._follow(self._kube.Pod, self._look_at_pod), name="pods"),
                asyncio.create_task(self._follow(self._kube.Job, self._look_at_job), name="jobs"),
            ]

    async def _create(self, thing: Any) -> Any:
        try:
            return await self._insist(lambda: self._client.create(thing))
        except self._kube.ApiError as error:
            if error.status.reason != "AlreadyExists":
                raise
            # A try whose answer was lost had made it.
            return await self._client.get(type(thing), thing.metadata.name)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Tries again while the API is overloaded or away."""
        for tries in range(_TRIES):
            try:
                return await call()
            except self._kube.HTTPError as error:
                code = error.response.status_code if hasattr(error, "response") else 503
                if tries == _TRIES - 1 or (code < 500 and code != 429):
                    raise
                log.info("the cluster's API does not answer, trying again: %s", error)
            await asyncio.sleep(_FIRST_WAIT_SECONDS * 2**tries)
        raise AssertionError("unreachable")

    async def _clean_up(self, name: str) -> None:
        self._cleaning.add(name)
        try:
            await self._delete(name)
        finally:
            self._cleaning.discard(name)

    async def _delete(self, name: str) -> None:
        background = self._kube.CascadeType.BACKGROUND
        for kind in (self._kube.Job, self._kube.Secret):
            try:
                await self._insist(
                    lambda kind=kind: self._client.delete(kind, name, cascade=background, grace_period=1)  # type: ignore[misc]  # called at once
                )
            except self._kube.HTTPError as error:
                if getattr(getattr(error, "status", None), "code", 0) != 404:
                    log.warning("%s %s is left to the cluster: %s", kind.__name__, name, error)

    # What becomes of Jobs and pods

    async def _follow(self, kind: Any, look: Callable[[Any, bool], None]) -> None:
        labels = {WORKER_LABEL: worker_digest(self.runner.worker_id)}
        while True:
            try:
                found = self._client.list(kind, labels=labels)
                async for thing in found:
                    look(thing, False)
                async for change, thing in self._client.watch(
                    kind,
                    labels=labels,
                    server_timeout=_WATCH_SECONDS,
                    resource_version=found.resourceVersion,
                ):
                    look(thing, change == "DELETED")
            except self._kube.HTTPError as error:
                log.info("a watch of the cluster ended, listing anew: %s", error)
            except Exception:
                # Whatever it was, agents wait for their pods' ends.
                log.exception("a watch of the cluster broke, listing anew")
            await asyncio.sleep(_FIRST_WAIT_SECONDS)

    def _look_at_pod(self, pod: Any, gone: bool) -> None:
        if gone or _is_over(pod, self._container):
            self._end(pod)

    def _look_at_job(self, job: Any, gone: bool) -> None:
        if job.metadata.labels[ATTEMPT_LABEL] not in self._ends:
            if not gone:
                self._orphaned(job)
        elif gone or _failure_of(job) is not None:
            # Its pod says more, if there still is one: it gets a moment.
            asyncio.get_running_loop().call_later(_JOB_SECONDS, self._end, job)

    def _end(self, thing: Any) -> None:
        end = self._ends.get(thing.metadata.labels.get(ATTEMPT_LABEL, ""))
        if end is not None and not end.done():
            end.set_result(thing)

    def _orphaned(self, job: Any) -> None:
        """Deletes a Job of an earlier life of this worker: its attempt is over."""
        name = job.metadata.name
        if name not in self._cleaning:
            log.info("Job %s has no attempt and is deleted", name)
            task = asyncio.create_task(self._clean_up(name))
            self._watches.append(task)
            task.add_done_callback(self._watches.remove)

    async def _outcome(self, pod: Any) -> Outcome:
        ended, waiting = _states(pod, self._container)
        output: dict[str, Any] = {
            "pod": pod.metadata.name, "node": pod.spec.nodeName, "output_tail": await self._tail(pod),
        }  # fmt: skip
        if ended is not None:
            output["exit_code"] = ended.exitCode
        reason = pod.status.reason or (waiting and waiting.reason) or (ended and ended.reason) or ""
        said = pod.status.message or (waiting and waiting.message) or ""
        if pod.status.phase == "Succeeded" and ended is not None:
            return outcome_of((ended.message or "").encode(), output)
        if reason == "DeadlineExceeded":
            return failed(reason, "the Job took longer than its deadline", output, FailureKind.TRUNCATED)
        if reason == "OOMKilled":
            message = "the container was killed: it needed more memory than its limit"
            return failed(reason, message, output, FailureKind.ENVIRONMENT)
        if reason in _CLUSTERS_DOING | _HOPELESS or ended is None:
            message = f"the pod ended: {reason or 'it was deleted'}" + (f", {said}" if said else "")
            return failed(reason or "PodDeleted", message, output, FailureKind.INFRASTRUCTURE)
        code = ended.exitCode
        return failed(f"exit code {code}", f"the container exited with code {code}", output)

    async def _tail(self, pod: Any) -> str:
        """The end of the agent's log; empty where there is none."""
        lines: list[str] = []
        try:
            read = self._client.log(pod.metadata.name, container=self._container, tail_lines=_TAIL_LINES)
            lines.extend([line async for line in read])
        except self._kube.HTTPError as error:
            log.debug("no log of pod %s: %s", pod.metadata.name, error)
        return "".join(lines).encode()[-TAIL_BYTES:].decode(errors="replace")


def _states(pod: Any, container: str) -> tuple[Any, Any]:
    """How the agent's container ended, and what it waits for."""
    for status in pod.status.containerStatuses or ():
        if status.name == container and status.state is not None:
            return status.state.terminated, status.state.waiting
    return None, None


def _is_over(pod: Any, container: str) -> bool:
    if pod.status is None:
        return False
    _, waiting = _states(pod, container)
    return pod.status.phase in ("Succeeded", "Failed") or (
        waiting is not None and waiting.reason in _HOPELESS
    )


def _failure_of(job: Any) -> Any:
    """The condition that says that the Job failed."""
    conditions = (job.status.conditions or ()) if job.status is not None else ()
    return next((one for one in conditions if one.type == "Failed" and one.status == "True"), None)


def _without_pod(job: Any) -> Outcome:
    condition = _failure_of(job)
    if condition is None:
        return failed("JobDeleted", "the Job was deleted", {}, FailureKind.INFRASTRUCTURE)
    if condition.reason == "DeadlineExceeded":
        return failed(condition.reason, "the Job took longer than its deadline", {}, FailureKind.TRUNCATED)
    message = f"the Job failed: {condition.reason}, {condition.message}"
    return failed(condition.reason or "JobFailed", message, {}, FailureKind.INFRASTRUCTURE)


class _Lightkube:
    """What is used of lightkube, imported when it is needed."""

    def __init__(self) -> None:
        import httpx2
        from lightkube import ApiError, AsyncClient
        from lightkube.config.kubeconfig import KubeConfig
        from lightkube.core.exceptions import ConfigError
        from lightkube.resources.batch_v1 import Job
        from lightkube.resources.core_v1 import Pod, Secret
        from lightkube.types import CascadeType

        # An `ApiError` is an `HTTPError` with the API's own status.
        self.HTTPError: Any = httpx2.HTTPError
        self.ApiError: Any = ApiError
        self.AsyncClient: Any = AsyncClient
        self.KubeConfig: Any = KubeConfig
        self.ConfigError: Any = ConfigError
        self.Job: Any = Job
        self.Pod: Any = Pod
        self.Secret: Any = Secret
        self.CascadeType: Any = CascadeType


def _import_lightkube() -> _Lightkube:
    try:
        return _Lightkube()
    except ImportError as error:
        raise LoadError("isolation kubernetes needs agl-grpc[kubernetes]; install it") from error

"""From a template of a Kubernetes Job to the Job of one attempt, as plain documents."""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from agl_grpc.runner.load import LoadError

Document = dict[str, Any]

FOLDER = "/var/run/agl-grpc"
"""Where a container finds its task and resources."""

REWARD_FILE = "/dev/termination-log"
"""Where it writes its reward: Kubernetes keeps up to 4 KiB of it in the pod's status."""

WORKER_LABEL = "agl-grpc.dev/worker"
"""Label of Jobs and pods: a digest of the worker's id, by which a worker finds its own."""

ATTEMPT_LABEL = "agl-grpc.dev/attempt"
"""Label of Jobs and pods: the attempt."""

CONTAINER = "agent"
"""The container that is the agent, where a template has several."""

_FINISHED_SECONDS = 600
_FILES = {"task": "task", "resources": "resources.json"}


def load_template(path: str) -> Document:
    """Reads and checks a template.

    Raises:
        LoadError: it cannot be read or is no Job with a container.
    """
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise LoadError(f"the Job template {path!r} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise LoadError(f"the Job template {path!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or document.get("kind") != "Job":
        raise LoadError(f"the Job template {path!r} must be one object of kind Job")
    try:
        _agent_container(document)
    except (KeyError, TypeError, StopIteration) as error:
        message = f"has no container: give spec.template.spec one, named {CONTAINER!r} if there are several"
        raise LoadError(f"the Job template {path!r} {message}") from error
    return document


def worker_digest(worker_id: str) -> str:
    """The value of `WORKER_LABEL` for a worker."""
    return hashlib.sha256(worker_id.encode()).hexdigest()[:32]


def object_name(attempt_id: str) -> str:
    """Name of an attempt's Job and Secret."""
    return f"agl-{re.sub(r'[^a-z0-9-]', '-', attempt_id.lower())}"[:63].rstrip("-")


def agent_container(template: Document) -> str:
    """Name of the container that is the agent."""
    return str(_agent_container(template)["name"])


def make_job(
    template: Document, attempt_id: str, worker_id: str, variables: Mapping[str, str], limit: float | None
) -> Document:
    """The Job of one attempt.

    Args:
        template: as `load_template` answers it.
        attempt_id: the attempt.
        worker_id: the worker that watches it.
        variables: names that are read from the attempt's Secret into the container's environment.
        limit: seconds after which the cluster ends it, should nobody else do so; None = no limit.
    """
    job = copy.deepcopy(template)
    name = object_name(attempt_id)
    labels = {WORKER_LABEL: worker_digest(worker_id), ATTEMPT_LABEL: attempt_id}
    metadata = job.setdefault("metadata", {})
    metadata.pop("generateName", None)
    metadata["name"] = name
    metadata.setdefault("labels", {}).update(labels)
    metadata.setdefault("annotations", {})["agl-grpc.dev/worker-id"] = worker_id
    spec = job["spec"]
    # The store decides on retries: each is an attempt of its own.
    spec |= {"backoffLimit": 0, "completions": 1, "parallelism": 1}
    spec.setdefault("ttlSecondsAfterFinished", _FINISHED_SECONDS)
    if limit is not None:
        spec["activeDeadlineSeconds"] = math.ceil(limit) + 1
    spec["template"].setdefault("metadata", {}).setdefault("labels", {}).update(labels)
    pod = spec["template"]["spec"]
    pod["restartPolicy"] = "Never"
    pod.setdefault("volumes", []).append(
        {
            "name": "agl-grpc",
            "secret": {
                "secretName": name,
                "items": [{"key": key, "path": path} for key, path in _FILES.items()],
            },
        }
    )
    container = _agent_container(job)
    container.setdefault("env", []).extend(_from_secret(name, variable) for variable in variables)
    container["env"].extend(
        {"name": name, "value": value}
        for name, value in (
            ("AGL_GRPC_TASK_FILE", f"{FOLDER}/task"),
            ("AGL_GRPC_RESOURCES_FILE", f"{FOLDER}/resources.json"),
            ("AGL_GRPC_REWARD_FILE", REWARD_FILE),
        )
    )
    container.setdefault("volumeMounts", []).append(
        {"name": "agl-grpc", "mountPath": FOLDER, "readOnly": True}
    )
    container |= {"terminationMessagePath": REWARD_FILE, "terminationMessagePolicy": "File"}
    return job


def make_secret(
    attempt_id: str, owner_uid: str, variables: Mapping[str, str], task: bytes, resources: bytes
) -> Document:
    """What the attempt's container is told, its credential among it; goes when its Job goes."""
    name = object_name(attempt_id)
    values = {key: value.encode() for key, value in variables.items()}
    values |= {"task": task, "resources": resources}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner_uid}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "ownerReferences": [owner]},
        "data": {key: base64.b64encode(value).decode() for key, value in values.items()},
    }


def _from_secret(secret: str, variable: str) -> Document:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": variable}}}


def _agent_container(job: Document) -> Document:
    containers = job["spec"]["template"]["spec"]["containers"]
    if len(containers) == 1:
        found = containers[0]
    else:
        found = next(one for one in containers if one["name"] == CONTAINER)
    if not isinstance(found["name"], str):
        raise TypeError("a container without a name")
    return cast(Document, found)

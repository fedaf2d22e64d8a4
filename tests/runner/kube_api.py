"""A stateful fake of a Kubernetes API server, over real HTTP: Jobs, Pods, Secrets, watches, logs.

Its one node is honest: a pod of a Job runs its container's command, as a process of this machine, with
environment and files of its Secret. What no such node can do is ordered by `FakeCluster.fate`.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

Document = dict[str, Any]

NAMESPACE = "agents"
KINDS = {"jobs": "Job", "pods": "Pod", "secrets": "Secret"}


class FakeCluster:
    """The cluster; a context manager. `refuse` is asked about each request; a status is the answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed = threading.Condition()
        self.objects: dict[str, dict[str, Document]] = {kind: {} for kind in KINDS}
        self.events: list[tuple[int, str, str, Document]] = []
        self.version = 1
        self.compacted = 0
        self.logs: dict[str, str] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.seen: list[str] = []
        self.fate = ""
        """What becomes of new pods: `image`, `evicted`, `oom`, `deleted`, `no pod`; empty = they run."""
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self._threads: list[threading.Thread] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.stopping = False

    def kubeconfig(self) -> Path:
        """A configuration file that names it."""
        path = self.folder / "kubeconfig"
        cluster = {"server": f"http://127.0.0.1:{self._server.server_port}"}
        context = {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}
        body = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "fake", "user": {}}],
            "contexts": [{"name": "fake", "context": context}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(body))
        return path

    def __enter__(self) -> FakeCluster:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping = True
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        for process in list(self.processes.values()):
            process.kill()
        for thread in self._threads:
            thread.join(10)

    def names(self, kind: str) -> list[str]:
        """What is there of a kind."""
        with self.changed:
            return list(self.objects[kind])

    def put(self, kind: str, event: str, document: Document) -> None:
        """Writes or deletes an object, and tells those who watch."""
        with self.changed:
            self.version += 1
            document["metadata"]["resourceVersion"] = str(self.version)
            name = document["metadata"]["name"]
            if event == "DELETED":
                self.objects[kind].pop(name, None)
            else:
                self.objects[kind][name] = document
            self.events.append((self.version, kind, event, json.loads(json.dumps(document))))
            self.changed.notify_all()

    def create(self, kind: str, document: Document) -> None:
        """Takes a new object; a Job gets its pod."""
        metadata = document["metadata"]
        metadata |= {"uid": f"uid-{self.version}", "namespace": NAMESPACE}
        self.put(kind, "ADDED", document)
        if kind == "jobs":
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": metadata["name"] + "-x1",
                    "labels": document["spec"]["template"]["metadata"]["labels"],
                },
                "spec": {**document["spec"]["template"]["spec"], "nodeName": "node-1"},
                "status": {"phase": "Pending"},
            }
            if self.fate != "no pod":
                self.put("pods", "ADDED", pod)
            thread = threading.Thread(target=self._live, args=(document, pod), daemon=True)
            self._threads.append(thread)
            thread.start()

    def delete(self, kind: str, name: str) -> None:
        """Deletes an object; a Job takes its pod and its Secret with it."""
        document = self.objects[kind][name]
        self.put(kind, "DELETED", document)
        if kind == "jobs":
            pod = name + "-x1"
            if pod in self.processes:
                self.processes[pod].kill()
            for other, owned in (("pods", pod), ("secrets", name)):
                if owned in self.objects[other]:
                    self.put(other, "DELETED", self.objects[other][owned])

    # The node

    def _live(self, job: Document, pod: Document) -> None:
        fate = self.fate
        container = pod["spec"]["containers"][0]
        if fate == "image":
            self._status(pod, "Pending", waiting={"reason": "ImagePullBackOff", "message": "no such image"})
        elif fate == "evicted":
            self._status(pod, "Failed", reason="Evicted", message="the node was low on memory")
        elif fate == "oom":
            self._status(pod, "Failed", terminated={"exitCode": 137, "reason": "OOMKilled"})
        elif fate in ("deleted", "no pod"):
            if fate == "deleted":
                self.put("pods", "DELETED", pod)
            condition = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "m"}
            self.put("jobs", "MODIFIED", {**job, "status": {"conditions": [condition]}})
        else:
            self._run(job["metadata"]["name"], pod, container)

    def _run(self, job: str, pod: Document, container: Document) -> None:
        secret = self._secret_of(job)
        if secret is None:
            return
        values = {key: base64.b64decode(value) for key, value in secret["data"].items()}
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            folder = Path(place)
            (volume,) = [one for one in pod["spec"]["volumes"] if "secret" in one]
            (mount,) = [one for one in container["volumeMounts"] if one["name"] == volume["name"]]
            for item in volume["secret"]["items"]:
                (folder / item["path"]).write_bytes(values[item["key"]])
            message = folder / "termination-log"
            moved = {mount["mountPath"]: str(folder), container["terminationMessagePath"]: str(message)}
            environment = dict(os.environ)
            for entry in container["env"]:
                value = entry.get("value")
                if value is None:
                    value = values[entry["valueFrom"]["secretKeyRef"]["key"]].decode()
                for old, new in moved.items():
                    value = value.replace(old, new)
                environment[entry["name"]] = value
            command = container["command"] + container.get("args", [])
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as process:
                name = pod["metadata"]["name"]
                self.processes[name] = process
                self._status(pod, "Running", running={})
                assert process.stdout is not None
                self.logs[name] = process.stdout.read().decode()
                code = process.wait()
            said = message.read_text() if message.exists() else ""
        if name in self.objects["pods"]:
            ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "message": said}
            self._status(pod, "Succeeded" if code == 0 else "Failed", terminated=ended)

    def _secret_of(self, job: str) -> Document | None:
        with self.changed:
            self.changed.wait_for(lambda: job in self.objects["secrets"] or self.stopping, 20)
            return self.objects["secrets"].get(job)

    def _status(
        self, pod: Document, phase: str, *, reason: str = "", message: str = "", **state: Any
    ) -> None:
        pod = json.loads(json.dumps(pod))
        pod["status"] = {"phase": phase} | ({"reason": reason, "message": message} if reason else {})
        if state:
            name = pod["spec"]["containers"][0]["name"]
            pod["status"]["containerStatuses"] = [
                {"name": name, "state": state, "image": "i", "imageID": "", "ready": False, "restartCount": 0}
            ]
        self.put("pods", "MODIFIED", pod)


def _matches(document: Document, selector: str) -> bool:
    labels = document["metadata"].get("labels", {})
    wanted = (part.partition("=") for part in selector.split(",") if part)
    return all(labels.get(key.rstrip("=")) == value.lstrip("=") for key, _, value in wanted)


def _handler(cluster: FakeCluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """One request."""

        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            cluster.seen.append(format % arguments)

        def _target(self) -> tuple[str, list[str], dict[str, str]]:
            url = urllib.parse.urlsplit(self.path)
            query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
            group, _, rest = url.path.partition(f"/namespaces/{NAMESPACE}/")
            assert group in ("/apis/batch/v1", "/api/v1"), url.path
            kind, *names = rest.split("/")
            assert (kind == "jobs") == (group == "/apis/batch/v1"), url.path
            return kind, names, query

        def _refused(self) -> bool:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code = cluster.refuse(self.command, self.path)
            if code is not None:
                self._fail(code, "TooManyRequests" if code == 429 else "Forbidden", "the test says no")
            return code is not None

        def _fail(self, code: int, reason: str, message: str) -> None:
            status = {
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": message, "reason": reason, "code": code,
            }  # fmt: skip
            self._answer(status, code)

        def _answer(self, body: Document | str, code: int = 200) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            if self._refused():
                return
            kind, _, _ = self._target()
            document = json.loads(self.body)
            if document["metadata"]["name"] in cluster.objects[kind]:
                self._fail(409, "AlreadyExists", "it is there")
                return
            cluster.create(kind, document)
            self._answer(document, 201)

        def do_DELETE(self) -> None:
            if self._refused():
                return
            kind, names, _ = self._target()
            with cluster.changed:
                if names[0] not in cluster.objects[kind]:
                    self._fail(404, "NotFound", "it is not there")
                    return
                cluster.delete(kind, names[0])
            self._answer({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

        def do_GET(self) -> None:
            if self._refused():
                return
            kind, names, query = self._target()
            if names[1:] == ["log"]:
                self._answer(cluster.logs.get(names[0], ""))
            elif names:
                self._answer(cluster.objects[kind][names[0]])
            elif query.get("watch") in ("true", "True", "1"):
                self._watch(kind, query)
            else:
                with cluster.changed:
                    items = [
                        one
                        for one in cluster.objects[kind].values()
                        if _matches(one, query.get("labelSelector", ""))
                    ]
                    version = str(cluster.version)
                self._answer(
                    {"kind": f"{KINDS[kind]}List", "metadata": {"resourceVersion": version}, "items": items}
                )

        def _watch(self, kind: str, query: dict[str, str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            after = int(query.get("resourceVersion") or 0)
            if after < cluster.compacted:
                gone = {
                    "kind": "Status",
                    "code": 410,
                    "reason": "Expired",
                    "message": "too old",
                    "status": "Failure",
                }
                self.wfile.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                return
            end = time.monotonic() + 2.0  # short, so that clients have to watch again and again
            while time.monotonic() < end and not cluster.stopping:
                with cluster.changed:
                    news = [one for one in cluster.events if one[0] > after and one[1] == kind]
                    if not news:
                        cluster.changed.wait(0.2)
                for version, _, event, document in news:
                    after = version
                    if _matches(document, query.get("labelSelector", "")):
                        line = json.dumps({"type": event, "object": document}).encode() + b"\n"
                        self.wfile.write(line)
                        self.wfile.flush()

    return Handler

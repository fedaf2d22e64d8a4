"""Graders behind an HTTP endpoint."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

import orjson

from agl_grpc.grader.base import DEFAULT_RETRIES, DEFAULT_TIMEOUT, Grader
from agl_grpc.grader.command import read_grade
from agl_grpc.grader.grade import Grade, GraderFailed
from agl_grpc.grader.submission import Submission

_MOST_BYTES = 1 << 20


class HttpGrader(Grader):
    """Posts each submission as JSON (`Submission.to_dict`) and reads the grade from the answer.

    The answer is what a `CommandGrader` prints. 5xx, 429 and lost connections are tried again; other errors
    are final.

    Args:
        url: Where to post; http or https.
        headers: Sent along, for example `authorization`.
        name: See `Grader`, as `version`, `timeout` and `retries`.

    Raises:
        ValueError: a URL that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "http",
        version: str = "1",
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"url {url!r} of grader {name} must begin with http:// or https://")
        self.url = url
        self.headers = {"content-type": "application/json", **(headers or {})}
        super().__init__(name=name, version=version, timeout=timeout, retries=retries)

    async def grade(self, submission: Submission) -> Grade:
        """The endpoint's grade; raises `GraderFailed` with outcome `http` or `not_a_grade`."""
        told = orjson.dumps(submission.to_dict(), default=str, option=orjson.OPT_NON_STR_KEYS)
        return read_grade(await asyncio.to_thread(self._post, told))

    def _post(self, data: bytes) -> bytes:
        request = urllib.request.Request(self.url, data, self.headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer: bytes = response.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            again = error.code >= 500 or error.code == 429
            raise GraderFailed(f"{self.url} answered {error.code}", outcome="http", final=not again) from None
        except OSError as error:
            raise GraderFailed(f"{self.url} does not answer: {error}", outcome="http") from None
        if len(answer) > _MOST_BYTES:
            raise GraderFailed(f"{self.url} answered more than 1 MiB", outcome="not_a_grade")
        return answer

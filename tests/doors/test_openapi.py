"""The OpenAPI document, and a server that is asked everything that it describes, in and out of shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import allow_header_conformance, positive_data_acceptance

from agl_grpc.store.http.rest.openapi import document
from tests.support.store_process import StoreProcess
from tests.support.waiting import free_port


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server's REST API."""
    port = free_port()
    folder: Path = tmp_path_factory.mktemp("openapi")
    with StoreProcess(folder / "store.db", "--http-port", str(port)):
        yield f"http://127.0.0.1:{port}/agl/v1"


def test_the_document_is_served(url: str) -> None:
    served = httpx.get(f"{url}/openapi.json")
    assert served.json() == document("/agl/v1")


EXCLUDED = [
    # JSON schema cannot say all that is refused: bytes of a text, all-zero ids, an end before its start.
    positive_data_acceptance,
    # `/resources/latest` is documented beside `/resources/{resources_id}`, whose methods it has too.
    allow_header_conformance,
]

schema = schemathesis.openapi.from_dict(document("/agl/v1"))


@schema.parametrize()
@hypothesis.settings(
    max_examples=12, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=True
)
def test_the_server_keeps_to_its_document(case: Any, url: str) -> None:
    case.call_and_validate(base_url=url, excluded_checks=EXCLUDED)

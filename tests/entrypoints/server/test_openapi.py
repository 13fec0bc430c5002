"""Whatever our own OpenAPI description allows, and much that it does not: no 500, no hang, errors in one shape."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from support.server import ServerProcess

STATUSES = {200, 400, 404, 405, 409, 413, 415, 429, 499, 503, 504}
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def schema(server: ServerProcess) -> Any:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json")


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_no_request_makes_the_server_fail(case: Case, server: ServerProcess) -> None:
    case.headers = {**(case.headers or {}), "timeout": "2"}
    response = case.call(base_url=server.address, timeout=LIMIT_S)
    assert response.status_code in STATUSES, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert "0x" not in error["message"] or "0x..." in error["message"]


def test_the_service_goes_on(server: ServerProcess) -> None:
    server.wait_until_idle()
    assert server.get("/ready").status_code == 200
    body = {"model": "tiny-image", "prompt": "a red circle"}
    assert httpx.post(f"{server.base_url}/images/generations", json=body, timeout=LIMIT_S).status_code == 200

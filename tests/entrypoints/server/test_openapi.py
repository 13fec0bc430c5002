"""Whatever our own OpenAPI description allows, and much that it does not: no 500, no hang, errors in one shape."""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from support.loopback import http
from support.server import ServerProcess

STATUSES = {200, 400, 404, 405, 409, 413, 415, 429, 499, 503, 504}
LIMIT_S = 60.0
ADDRESS = re.compile(r"0x[0-9a-f]{6,}|/usr/|/tmp/|site-packages")


def test_no_request_makes_the_server_fail(server: ServerProcess) -> None:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:
        attack(operation, server)


def attack(operation: Any, server: ServerProcess) -> None:
    @given(operation.as_strategy())
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        case.headers = {**(case.headers or {}), "timeout": "2"}
        response = case.call(base_url=server.address, timeout=LIMIT_S)
        assert response.status_code in STATUSES, (operation.label, response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
            assert not ADDRESS.search(error["message"]), error

    check()


def test_the_service_goes_on(server: ServerProcess) -> None:
    server.wait_until_idle()
    assert server.get("/ready").status_code == 200
    body = {"model": "tiny-image", "prompt": "a red circle"}
    assert http.post(f"{server.base_url}/images/generations", json=body, timeout=LIMIT_S).status_code == 200

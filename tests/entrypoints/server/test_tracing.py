"""Spans of a request and its stages reach a real collector, below the caller's own trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support.loopback import http
from support.server import ServerProcess

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Keeps what is exported to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exports)
        self.spans: list[Span] = []


class Exports(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()


def test_a_request_and_its_stages_are_spans_of_the_callers_trace(collector: Collector) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}/v1/traces"
    with ServerProcess(["tiny_image"], ["--otel", endpoint]) as server:
        good, bad = ({"model": "tiny-image", "prompt": "a red circle", "num_inference_steps": n} for n in (3, 10**6))
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        http.post(f"{server.base_url}/images/generations", json=good, headers=headers, timeout=60).raise_for_status()
        http.post(f"{server.base_url}/images/generations", json=bad, timeout=60)
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    request, image = spans["/v1/images/generations"], spans["image"]
    assert request.parent_span_id.hex() == PARENT
    assert image.parent_span_id == spans["text"].parent_span_id == request.span_id
    assert request.start_time_unix_nano <= image.start_time_unix_nano
    assert image.end_time_unix_nano <= request.end_time_unix_nano
    counts = {pair.key: pair.value for pair in image.attributes}
    assert counts["vllm_omni.steps"].int_value == 3
    (refused,) = [span for span in collector.spans if span.trace_id.hex() != TRACE]
    assert refused.status.code == refused.status.STATUS_CODE_ERROR

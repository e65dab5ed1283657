"""Traces and logs of one process."""

from __future__ import annotations

import json
import logging
import time
from io import StringIO
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.rpc.logs import JsonFormatter, bind_request_id, log_failure
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry, trace_id_hex


def test_context_travels_through_headers() -> None:
    exporter = InMemorySpanExporter()
    telemetry = Telemetry("demo", "demo-1", processors=(SimpleSpanProcessor(exporter),))
    parent = telemetry.start_span("parent")
    headers = telemetry.inject(telemetry.context_of(parent))
    child = telemetry.start_span("child", parent=telemetry.extract(headers))
    assert set(headers) == {"traceparent"}
    assert trace_id_hex(child) == trace_id_hex(parent)
    child.end()
    parent.end()
    found = {span.name: span for span in exporter.get_finished_spans()}
    assert found["child"].parent is not None
    assert found["child"].parent.span_id == parent.get_span_context().span_id


def test_without_or_with_broken_headers_a_new_trace_begins() -> None:
    telemetry = Telemetry("demo", "demo-1")
    assert telemetry.inject() == {}
    for headers in ({}, {"traceparent": "nonsense"}):
        span = telemetry.start_span("root", parent=telemetry.extract(headers))
        assert span.get_span_context().is_valid


def test_spans_are_lines_in_a_file(tmp_path: Path) -> None:
    telemetry = Telemetry("decode", "decode-1", trace_dir=tmp_path / "traces")
    now_s = time.monotonic()
    with telemetry.start_span("parent") as parent:
        telemetry.record_span(
            "prefill.queue", now_s - 2.0, now_s - 0.5, telemetry.context_of(parent), {"a": [1]}
        )
        parent.end()
    telemetry.shutdown()
    lines = (tmp_path / "traces" / "decode-decode-1.jsonl").read_text().splitlines()
    queue, root = sorted(map(json.loads, lines), key=lambda line: line["name"], reverse=True)
    assert queue["name"] == "prefill.queue"
    assert queue["parent_id"] == root["span_id"]
    assert queue["trace_id"] == root["trace_id"] == trace_id_hex(parent)
    assert queue["end_unix_ns"] - queue["start_unix_ns"] == pytest.approx(1.5e9, abs=1e6)
    assert abs(queue["end_unix_ns"] / 1e9 - time.time()) < 5
    assert queue["service"] == "decode"
    assert queue["worker_id"] == "decode-1"
    assert queue["attributes"] == {"a": [1]}
    assert queue["status"] == "OK"
    assert root["parent_id"] is None


def _logged(name: str) -> tuple[logging.Logger, StringIO]:
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("decode", "decode-1"))
    logger = logging.getLogger(name)
    logger.propagate = False
    logger.handlers[:] = [handler]
    logger.setLevel("INFO")
    return logger, stream


async def test_log_lines_are_json_with_ids() -> None:
    logger, stream = _logged("test.ids")
    telemetry = Telemetry("decode", "decode-1")
    span = telemetry.start_span("rpc")
    telemetry.set_current(telemetry.context_of(span))
    bind_request_id("req-1")
    logger.info("handoff sent", extra={"num_blocks": 3})
    line = json.loads(stream.getvalue())
    assert line["event"] == "handoff sent"
    assert line["num_blocks"] == 3
    assert line["request_id"] == "req-1"
    assert line["trace_id"] == trace_id_hex(span)
    assert (line["role"], line["worker_id"], line["level"]) == ("decode", "decode-1", "info")


def test_unexpected_errors_are_logged_without_their_texts() -> None:
    logger, stream = _logged("test.failure")
    secret = "what the user wrote"  # held in a variable: frames show source lines, not values
    try:
        try:
            raise KeyError(secret)
        except KeyError as cause:
            raise ValueError(f"the prompt was: {secret}") from cause
    except ValueError as error:
        log_failure(logger, "rpc failed", error, rpc_method="x")
    assert secret not in stream.getvalue()
    line = json.loads(stream.getvalue())
    assert line["error_type"] == "ValueError"
    assert any("test_telemetry.py" in frame for frame in line["traceback"])
    assert "builtins.KeyError" in line["traceback"]


def test_metrics_are_served_over_http() -> None:
    import urllib.request

    metrics = Metrics("decode", "decode-1", "1.2.3")
    metrics.counter("things", "Things", ("kind",)).labels("a").inc(2)
    blocks = {"free": 3.0}
    metrics.gauge_at_scrape("kv_blocks", "Blocks", "state", lambda: blocks)
    metrics.gauge_at_scrape("plain", "Plain", "", lambda: {"": 7.0})
    port = metrics.serve("127.0.0.1", 0)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return str(response.read().decode())

    try:
        assert 'baton_things_total{kind="a"} 2.0' in scrape()
        assert 'baton_kv_blocks{state="free"} 3.0' in scrape()
        assert "baton_plain 7.0" in scrape()
        assert "baton_build_info{python=" in scrape()
        blocks["free"] = 1.0
        assert 'baton_kv_blocks{state="free"} 1.0' in scrape()
    finally:
        metrics.close()

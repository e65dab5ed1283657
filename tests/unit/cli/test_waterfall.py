"""Traces of several processes become one waterfall."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from baton.cli.trace_files import SpanRecord, as_tree, find_trace, read_spans
from baton.cli.waterfall import bar, print_waterfall, to_document

MS = 1_000_000
GENERATE = "baton.v1.InferenceService/Generate"


def line(
    span_id: str,
    parent: str | None,
    name: str,
    start_ms: int,
    end_ms: int,
    *,
    trace_id: str = "a" * 32,
    service: str = "scheduler",
    **attributes: object,
) -> str:
    return json.dumps({
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": parent,
        "name": name,
        "kind": "INTERNAL",
        "service": service,
        "worker_id": f"{service}-1",
        "start_unix_ns": start_ms * MS,
        "end_unix_ns": end_ms * MS,
        "attributes": attributes,
        "status": "OK",
    })


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    (tmp_path / "scheduler-1.jsonl").write_text(
        "\n".join([
            line("s1", None, GENERATE, 100, 200, **{"baton.request_id": "req-1"}),
            line("s2", "s1", "reserve", 110, 120),
            line("x1", None, GENERATE, 10, 20, trace_id="b" * 32),
            line("y1", None, "engine.step", 900, 901, trace_id="c" * 32),
            "not json",
            '{"trace_id": "half',
        ])
    )
    (tmp_path / "decode-1.jsonl").write_text(
        line("d1", "s1", "decode", 140, 199, service="decode")
        + "\n"
        + line("d2", "d1", "decode.first_step", 141, 143, service="decode")
        + "\n"
    )
    (tmp_path / "prefill-1.jsonl").write_text(
        line("p1", "s1", "prefill.compute", 120, 140, service="prefill")
    )
    return tmp_path


def test_latest_request_is_found_across_processes(traces: Path) -> None:
    spans = find_trace(read_spans(traces))
    assert [span.span_id for span in spans] == ["s1", "s2", "p1", "d1", "d2"]


@pytest.mark.parametrize("wanted", ["b" * 32, "bbbbbbbb"])
def test_trace_is_found_by_id_or_its_beginning(traces: Path, wanted: str) -> None:
    assert [span.span_id for span in find_trace(read_spans(traces), wanted)] == ["x1"]


def test_trace_is_found_by_request_id(traces: Path) -> None:
    assert find_trace(read_spans(traces), "req-1")[0].span_id == "s1"
    assert find_trace(read_spans(traces), "req-9") == []


def test_tree_is_depth_first_and_orphans_are_roots(traces: Path) -> None:
    rows = as_tree(find_trace(read_spans(traces)))
    assert [(span.span_id, depth) for depth, span in rows] == [
        ("s1", 0),
        ("s2", 1),
        ("p1", 1),
        ("d1", 1),
        ("d2", 2),
    ]
    orphan = SpanRecord("t", "o", "never-written", "n", "s", "w", 0, 1)
    assert [depth for depth, _ in as_tree([orphan])] == [0]


def test_waterfall_shows_every_span_with_offset_and_duration(traces: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None)
    print_waterfall(console, find_trace(read_spans(traces)))
    text = out.getvalue()
    assert "5 spans, 3 processes, 100.0 ms" in text
    rows = {row.split()[0]: row for row in text.splitlines()[2:] if row.strip()}
    assert rows["prefill.compute"].split()[1:4] == ["prefill", "20.0", "20.0"]
    assert rows["InferenceService/Generate"].rstrip().endswith("█")
    assert rows["prefill.compute"].index("█") > rows["InferenceService/Generate"].index("█")


def test_json_has_offsets_from_the_first_span(traces: Path) -> None:
    document = to_document(find_trace(read_spans(traces)))
    assert document["duration_ms"] == 100.0
    assert [span["start_ms"] for span in document["spans"]] == [0, 10, 20, 40, 41]
    assert [span["depth"] for span in document["spans"]] == [0, 1, 1, 1, 2]


@given(
    total=st.integers(1, 10**10),
    offset=st.integers(0, 10**10),
    duration=st.integers(0, 10**10),
    width=st.integers(1, 80),
)
def test_bar_is_never_empty_and_never_too_long(
    total: int, offset: int, duration: int, width: int
) -> None:
    drawn = bar(offset, duration, total, width)
    assert drawn.strip()
    assert len(drawn) <= width


def test_whole_and_half_bars() -> None:
    assert bar(0, 10, 10, 4) == "████"
    assert bar(5, 5, 10, 4) == "  ██"
    assert bar(0, 1, 80, 10) == "▏"

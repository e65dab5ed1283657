"""Draws one trace as a waterfall in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.cli.trace_files import SpanRecord, as_tree
from baton.core.roles import Role

_MIN_BAR_CELLS = 16
_MAX_BAR_CELLS = 60
_OTHER_COLUMNS_CELLS = 66
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SERVICE_STYLES = {
    "client": "white",
    Role.GATEWAY: "white",
    Role.SCHEDULER: "blue",
    Role.TOKENIZER: "magenta",
    Role.PREFILL: "yellow",
    Role.DECODE: "green",
    Role.CACHE: "cyan",
}


def print_waterfall(console: Console, spans: list[SpanRecord]) -> None:
    """One line per span: name, service, start, duration, bar. `spans` must not be empty."""
    start_ns = min(span.start_ns for span in spans)
    total_ns = max(1, max(span.end_ns for span in spans) - start_ns)
    width = min(_MAX_BAR_CELLS, max(_MIN_BAR_CELLS, console.width - _OTHER_COLUMNS_CELLS))
    processes = {span.worker_id for span in spans}
    console.print(
        f"trace {spans[0].trace_id}: {len(spans)} spans, {len(processes)} processes,"
        f" {total_ns / 1e6:.1f} ms",
        style="bold",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("span", no_wrap=True, overflow="ellipsis", max_width=38)
    table.add_column("service", no_wrap=True)
    table.add_column("start ms", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=width)
    for depth, span in as_tree(spans):
        style = "bold red" if span.is_error else _SERVICE_STYLES.get(span.service, "")
        offset_ns = span.start_ns - start_ns
        name = span.name.rpartition(".")[2] if "/" in span.name else span.name
        table.add_row(
            Text("  " * depth + name, style="bold red" if span.is_error else ""),
            Text(span.service, style=style),
            f"{offset_ns / 1e6:.1f}",
            f"{span.duration_s * 1e3:.1f}",
            Text(bar(offset_ns, span.end_ns - span.start_ns, total_ns, width), style=style),
        )
    console.print(table, highlight=False)


def to_document(spans: list[SpanRecord]) -> dict[str, Any]:
    """The trace as `baton trace --json` prints it: spans depth first, times in ms."""
    start_ns = min(span.start_ns for span in spans)
    return {
        "trace_id": spans[0].trace_id,
        "start_unix_ns": start_ns,
        "duration_ms": (max(span.end_ns for span in spans) - start_ns) / 1e6,
        "spans": [
            {
                "name": span.name,
                "service": span.service,
                "worker_id": span.worker_id,
                "span_id": span.span_id,
                "parent_id": span.parent_id,
                "depth": depth,
                "start_ms": (span.start_ns - start_ns) / 1e6,
                "duration_ms": span.duration_s * 1e3,
                "attributes": span.attributes,
                "is_error": span.is_error,
            }
            for depth, span in as_tree(spans)
        ],
    }


def bar(offset_ns: int, duration_ns: int, total_ns: int, width: int) -> str:
    """A bar of `width` cells, to an eighth of a cell; never empty."""
    begin = round(8 * width * offset_ns / total_ns)
    end = round(8 * width * (offset_ns + duration_ns) / total_ns)
    begin = min(max(0, begin), 8 * width - 1)
    end = min(max(begin + 1, end), 8 * width)
    first, last = begin // 8, (end - 1) // 8
    if first == last:
        return " " * first + _EIGHTHS[end - begin]
    # Blocks fill from the left, so a start within a cell is rounded down to the cell.
    return " " * first + "█" * (last - first) + _EIGHTHS[end - 8 * last]

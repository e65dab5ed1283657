"""deploy/telemetry.yaml lists what the code emits: no more, no less, with the same labels."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from baton.core.stages import StageName
from tests.support.repository import ROOT, parts

METRIC_CALLS = {
    "counter": "counter",
    "gauge": "gauge",
    "histogram": "histogram",
    "gauge_at_scrape": "gauge",
    "counter_at_scrape": "counter",
}
SPAN_CALLS = {"start_span", "record_span", "_record", "stage"}
NAMESPACES = ("baton", "gen_ai", "rpc", "messaging", "http", "error", "service", "server", "url")
ATTRIBUTE = re.compile(rf"(?:{'|'.join(NAMESPACES)})(?:\.[a-z_]+)+")
# Strings that look like attributes and are not.
OTHER_STRINGS = {
    "http.disconnect": "ASGI event",
    "http.request": "ASGI event",
    "http.response.body": "ASGI event",
    "http.response.start": "ASGI event",
    "baton.cli.background": "module",
    "baton.kv": "NATS subject",
    "baton.member": "NATS subject",
}
UNITS = {"seconds": "s", "bytes": "By"}


@pytest.fixture(scope="module")
def listed() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "telemetry.yaml").read_text(encoding="utf-8"))


def _product_nodes() -> Iterator[tuple[str, ast.AST]]:
    for part in parts():
        for path in part.modules():
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield part.name, node


def _text(node: ast.expr) -> str | None:
    """A string as written, with {} for each value in it, or a stage's name; else None."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "StageName":
        return StageName[node.attr].value
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_text else None


def _calls(names: set[str]) -> Iterator[tuple[str, str, ast.Call]]:
    """(part, method, call) of every method call with one of the names and a text first."""
    for part, node in _product_nodes():
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_method and node.func.attr in names and node.args and _text(node.args[0]) is not None:
            yield part, node.func.attr, node


def _labels(call: ast.Call) -> list[str]:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "labels"]
    given += call.args[2:3]
    if not given:
        return []
    value = ast.literal_eval(given[0])
    return list(value) if isinstance(value, tuple) else [value] if value else []


def emitted_metrics() -> dict[str, dict[str, Any]]:
    """Kind, labels and emitting part of every metric, by name."""
    found: dict[str, dict[str, Any]] = {}
    for part, method, call in _calls(set(METRIC_CALLS)):
        name = f"baton_{_text(call.args[0])}"
        assert name not in found, f"{name} is registered twice"
        found[name] = {"kind": METRIC_CALLS[method], "labels": _labels(call), "from": part}
    return found


def emitted_spans() -> dict[str, set[str]]:
    """Emitting parts of every span, by name."""
    found: dict[str, set[str]] = {}
    for part, _, call in _calls(SPAN_CALLS):
        found.setdefault(str(_text(call.args[0])), set()).add(part)
    return found


def emitted_attributes() -> set[str]:
    """Every string of the product that is an attribute's name."""
    found = {
        node.value
        for _, node in _product_nodes()
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and ATTRIBUTE.fullmatch(node.value)
    }
    return found - set(OTHER_STRINGS)


def test_metrics_are_the_listed_ones(listed: dict[str, Any]) -> None:
    fields = ("kind", "labels", "from")
    wanted = {
        name: {field: metric[field] for field in fields}
        for name, metric in listed["metrics"].items()
    }
    assert emitted_metrics() == wanted


def test_spans_are_the_listed_ones(listed: dict[str, Any]) -> None:
    wanted = {name: set(span["from"]) for name, span in listed["spans"].items()}
    # The interceptor's span is named by the method that was called.
    assert wanted.pop("{package}.{service}/{method}") == {"rpc"}
    assert emitted_spans() == wanted


def test_attributes_are_the_listed_ones(listed: dict[str, Any]) -> None:
    assert emitted_attributes() == set(listed["attributes"])


def test_names_carry_their_unit(listed: dict[str, Any]) -> None:
    for name, metric in listed["metrics"].items():
        suffix = name.rpartition("_")[2]
        assert metric["unit"] == UNITS.get(suffix, metric["unit"]), name
        assert metric["unit"] not in UNITS.values() or suffix in UNITS, name


def test_labels_are_bounded(listed: dict[str, Any]) -> None:
    unbounded = {"request_id", "trace_id", "seq_id", "prompt", "user", "address"}
    for name, metric in listed["metrics"].items():
        assert set(metric["labels"]) & unbounded == set(), name


def test_everything_is_described(listed: dict[str, Any]) -> None:
    for kind in ("metrics", "spans"):
        assert [name for name, entry in listed[kind].items() if not entry.get("text")] == []
    assert [name for name, text in listed["attributes"].items() if not text] == []

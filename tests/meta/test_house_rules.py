"""The rules of the house that no off-the-shelf linter knows."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT, SERVICES, parts, tracked_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PRODUCT_CODE_LINES = 25_128
BANNED_MODULE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
UNSAFE_SERIALIZERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
# Edges where anything may be caught, because somebody else must go on; each logs what it caught.
BROAD_EXCEPT_ALLOWED = {
    "shared/rpc/baton/rpc/hosting.py": "a process's edge: the next step of its end must run",
    "shared/rpc/baton/rpc/bus.py": "a subscription's edge: one bad message must not end it",
    "shared/engine/baton/engine/worker.py": "the engine's loop: its sequences must be told",
    "services/gateway/baton/gateway/generation.py": "a stream's edge: its client must be told",
    "services/gateway/baton/gateway/merged_streams.py": "a task's edge: its reader raises it again",
}
EDGES = {
    "gateway": "app.py",
    "scheduler": "front.py",
    "tokenizer": "tokenizer.py",
    "cache": "cache.py",
    "prefill": "service.py",
    "decode": "service.py",
}
"""What answers a service's calls, where that is not a servicer."""
READS_TIME = {
    "shared/wire/baton/wire/clock.py": "the system's clock",
    "shared/client/": "a caller's program has no clock to hand in",
    "shared/cli/": "a command has no clock to hand in",
    "shared/engine/": "the engine measures its steps",
    "shared/handoff/baton/handoff/transports/nixl.py": "polls on a thread, outside the event loop",
    "shared/rpc/baton/rpc/telemetry.py": "moves monotonic readings to Unix time for export",
    "services/gateway/": "measures its clients and limits their sockets",
}
"""Files, and folders, that read time without a Clock; why each may."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

PRODUCT = [path for part in parts() for path in part.all_modules()]
"""Generated files obey the rules of files and functions, but do not count as code."""


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(_tree(path))


def _found(breach: object, paths: list[Path] | None = None) -> list[str]:
    """`file:line` of every node of the product for which `breach(node)` is true."""
    return [
        f"{_relative(path)}:{node.lineno}"
        for path in (PRODUCT if paths is None else paths)
        for node in _nodes(path)
        if breach(node)  # type: ignore[operator]
    ]


def test_files_are_short() -> None:
    suffixes = {".js", ".css", ".html", ".c", ".h"}
    others = [path for path in tracked_files() if path.suffix in suffixes]
    lengths = {_relative(path): _num_lines(path) for path in (*PRODUCT, *others)}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = _found(
        lambda node: (
            isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
        )
    )
    assert long == []


def _code_lines(path: Path) -> int:
    """Lines that hold code: without blank lines, comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        number
        for token in tokens
        if token.type not in {*skipped, tokenize.ENDMARKER}
        for number in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def _num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _c_code_lines(path: Path) -> int:
    source = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return sum(bool(line.strip()) for line in source.splitlines())


def test_product_is_small_and_size_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = [f"\n{'part':<12}{'files':>7}{'longest':>9}{'lines':>8}{'code':>8}"]
    totals = [0, 0, 0]
    for part in parts():
        lines = [_num_lines(path) for path in part.modules()]
        row = [len(lines), sum(lines), sum(map(_code_lines, part.modules()))]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        longest = max(lines, default=0)
        table.append(f"{part.name:<12}{row[0]:>7}{longest:>9}{row[1]:>8}{row[2]:>8}")
    native = [path for path in tracked_files() if path.suffix in {".c", ".h"}]
    row = [len(native), sum(map(_num_lines, native)), sum(map(_c_code_lines, native))]
    totals = [total + value for total, value in zip(totals, row, strict=True)]
    table.append(
        f"{'kernels in C':<12}{row[0]:>7}{max(map(_num_lines, native)):>9}{row[1]:>8}{row[2]:>8}"
    )
    table.append(f"{'total':<12}{totals[0]:>7}{'':>9}{totals[1]:>8}{totals[2]:>8}\n")
    with capsys.disabled():
        sys.stdout.write("\n".join(table))
    assert totals[2] <= MAX_PRODUCT_CODE_LINES


def test_nothing_prints() -> None:
    def prints(node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        )

    assert _found(prints) == []


def test_nothing_asserts() -> None:
    assert _found(lambda node: isinstance(node, ast.Assert)) == []


def test_nothing_unpickles() -> None:
    def imports_unsafe(node: ast.AST) -> bool:
        if isinstance(node, ast.Import):
            return any(alias.name.split(".")[0] in UNSAFE_SERIALIZERS for alias in node.names)
        return (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] in UNSAFE_SERIALIZERS
        )

    def loads_with_torch(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"

    assert _found(imports_unsafe) == []
    assert _found(loads_with_torch) == [], "torch.load unpickles; weights are safetensors"


def _is_broad(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    caught = ast.unparse(node.type) if node.type else "BaseException"
    names = {name.strip() for name in caught.strip("()").split(",")}
    # Raising again, as it was or explained, hides nothing.
    return bool(names & {"Exception", "BaseException"}) and not isinstance(node.body[-1], ast.Raise)


def test_nothing_is_caught_broadly() -> None:
    found = {place.split(":")[0] for place in _found(_is_broad)}
    assert found - set(BROAD_EXCEPT_ALLOWED) == set()
    assert set(BROAD_EXCEPT_ALLOWED) - found == set(), "these need no exception any more"


def test_no_global_statements() -> None:
    assert _found(lambda node: isinstance(node, ast.Global)) == []


def test_module_names_say_something() -> None:
    assert [_relative(path) for path in PRODUCT if path.stem in BANNED_MODULE_NAMES] == []


def test_baton_stays_a_namespace() -> None:
    """One `baton/__init__.py` would hide every other distribution's part of the namespace."""
    owners = [part.folder / "baton" / "__init__.py" for part in parts()]
    assert [_relative(path) for path in owners if path.exists()] == []
    assert {part.name for part in parts() if not (part.package / "py.typed").is_file()} == set()


@pytest.mark.parametrize("service", SERVICES)
def test_services_look_alike(service: str) -> None:
    package = ROOT / "services" / service / "baton" / service
    edge = EDGES.get(service, "servicer.py")
    for name in ("__main__.py", "settings.py", edge):
        assert (package / name).is_file(), f"{service} has no {name}"


def test_nothing_names_somebodys_machine() -> None:
    homes = "|".join(("root", "home/[a-z]", "Users/[A-Za-z]", "work", "opt/wheels"))
    pattern = re.compile(rf"(?<![\w.}})])/(?:{homes})(?:/|\b)")
    binary = {".safetensors", ".png", ".gz"}
    found = []
    for path in tracked_files():
        if path.suffix in binary or path == Path(__file__) or "deploy/models" in str(path):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{_relative(path)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_every_todo_has_an_issue() -> None:
    loose = re.compile(r"#\s*(TODO|FIXME|XXX|HACK)(?!\(#\d+\))")
    found = [
        f"{_relative(path)}:{number}"
        for path in PRODUCT
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if loose.search(line)
    ]
    assert found == []


def test_time_comes_from_a_clock() -> None:
    direct = {
        "time.monotonic",
        "time.monotonic_ns",
        "time.time",
        "time.time_ns",
        "asyncio.sleep",
        "asyncio.timeout",
    }

    def reads_time(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and ast.unparse(node) in direct

    found = {place.split(":")[0] for place in _found(reads_time)}
    assert [name for name in sorted(found) if not name.startswith(tuple(READS_TIME))] == []
    unused = {key for key in READS_TIME if not any(name.startswith(key) for name in found)}
    assert unused == set(), "these need no exception any more"


def test_tasks_that_run_for_ever_are_supervised() -> None:
    """`rpc.tasks` logs their unexpected end, and stops the process where it needs them."""

    def endless(path: Path) -> set[str]:
        return {
            node.name
            for node in _nodes(path)
            if isinstance(node, ast.AsyncFunctionDef)
            and any(isinstance(inner, ast.While) and is_true(inner.test) for inner in node.body)
        }

    def is_true(node: ast.expr) -> bool:
        return isinstance(node, ast.Constant) and node.value is True

    def started(node: ast.AST) -> str:
        """Name of the coroutine that a bare `create_task` starts."""
        is_start = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("create_task")
        work = node.args[0] if is_start and node.args else None  # type: ignore[attr-defined]
        return ast.unparse(work.func).split(".")[-1] if isinstance(work, ast.Call) else ""

    cli = ROOT / "shared/cli"  # A command ends with its task.
    names = {path: endless(path) for path in PRODUCT if not path.is_relative_to(cli)}
    bare = [
        f"{_relative(path)}:{node.lineno}"  # type: ignore[attr-defined]
        for path in names
        if names[path]
        for node in _nodes(path)
        if started(node) in names[path]
    ]
    assert bare == []

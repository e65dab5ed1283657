"""What may only become less: homonyms, import circles, phrases of translated English."""

from __future__ import annotations

import ast

import pytest

from tests.meta import ratchets
from tests.meta.ratchets import COMMAND, Ledger
from tests.support.repository import ROOT, parts

DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.fixture(scope="module")
def now() -> Ledger:
    return ratchets.measure()


def test_nothing_became_more(now: Ledger) -> None:
    lines = ratchets.complaints(ratchets.read(), now)
    assert lines == [], "\n" + "\n".join(lines)


def test_the_ledger_says_what_is_there(now: Ledger) -> None:
    """Fails after an improvement, and after a file moved, until the ledger follows."""
    ledger = ratchets.read()
    differing = sorted(key for key in {*ledger, *now} if ledger[key] != now[key])
    lines = [f"{' '.join(key)}: {ledger[key]} in the ledger, {now[key]} now" for key in differing]
    assert lines == [], "\n".join(["", *lines, f"run: {COMMAND}"])


def test_allowed_names_are_needed() -> None:
    """`wire` may not exist yet: what core and it share stays listed until both are there."""
    stems = {path.stem for part in parts() for path in part.modules()}
    python = {"__init__", "__main__"}
    pending = {"clock", "cluster", "errors", "layout", "sampling", "timing", "frames"}
    assert set(ratchets.SHARED_FILE_NAMES) - stems - python - pending == set()


def test_everything_public_has_a_docstring() -> None:
    silent = []
    for path in (path for part in parts() for path in part.modules()):
        place = path.relative_to(ROOT)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem != "__init__" and ast.get_docstring(tree) is None:
            silent.append(str(place))
        silent += [f"{place}:{node.lineno} {node.name}" for node in _silent(tree)]
    assert silent == []


def _silent(owner: ast.Module | ast.ClassDef) -> list[ast.ClassDef | ast.FunctionDef]:
    """Public classes, functions and methods without a docstring; overloads need none."""
    found = []
    for node in owner.body:
        if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if "overload" in decorators or any(name.endswith(".setter") for name in decorators):
            continue
        if ast.get_docstring(node) is None:
            found.append(node)
        if isinstance(node, ast.ClassDef):
            found += _silent(node)
    return found


def test_a_move_is_followed_and_a_rise_is_not() -> None:
    old = Ledger({("phrase", "nobody", "a.py"): 2, ("class", "Push"): 2})
    moved = Ledger({("phrase", "nobody", "b.py"): 2, ("class", "Push"): 2})
    assert ratchets.risen(old, moved) == {}
    assert ratchets.risen(old, moved + Ledger({("phrase", "nobody", "c.py"): 1})) == {
        ("phrase", "nobody"): (2, 3)
    }
    assert ratchets.risen(old, moved + Ledger({("class", "Job"): 2})) == {("class", "Job"): (0, 2)}

"""The documents name only what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.repository import ROOT, SERVICES, parts

# docs/structure.md is written by a command; test_structure.py names it where the page is stale.
PAGES = sorted({*(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "structure.md"})
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES]
# Their commands and code are for copying.
GUIDES = [ROOT / "README.md", ROOT / "docs" / "using.md", ROOT / "docs" / "deploying.md"]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", _text(document))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text(ROOT / "Makefile"), flags=re.MULTILINE))
    code = re.findall(r"`([^`\n]+)`", _text(document))
    code += re.findall(r"```sh\n(.*?)```", _text(document), flags=re.DOTALL)
    named = set(re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", "\n".join(code)))
    assert named <= targets


def test_documented_commands_exist() -> None:
    from typer.main import get_command

    from baton.cli.main import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    text = "\n".join(_text(page) for page in GUIDES)
    found = re.findall(r"^\.venv/bin/baton (\w+)(?: [^#\n]*?(--[a-z-]+))?", text, re.MULTILINE)
    assert len(found) >= 8
    for name, option in found:
        assert name in known
        options = {text for parameter in known[name].params for text in parameter.opts}
        assert not option or option in options, f"baton {name} {option}"


def test_documented_python_is_python_and_its_names_exist() -> None:
    import baton.client as sdk

    text = "\n".join(_text(page) for page in GUIDES)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "baton.client":
                assert [alias.name for alias in node.names if not hasattr(sdk, alias.name)] == []


def test_documented_error_names_are_the_sdks() -> None:
    import baton.client as sdk

    using = _text(ROOT / "docs" / "using.md")
    (names,) = re.findall(r"Failures are typed \(([^)]*)\)", using)
    for name in re.findall(r"`(\w+)`", names):
        assert name in sdk.__all__


def test_decisions_have_their_parts() -> None:
    decisions = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{n + 1:04}" for n in range(len(decisions))]
    for path in decisions:
        headings = re.findall(r"^## (.+)$", _text(path), flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences", "Rejected"], path.name


MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_drawings_are_balanced(document: Path) -> None:
    """What commonly keeps mermaid from drawing: brackets, quotes, and blocks without an end."""
    for drawing in MERMAID.findall(_text(document)):
        assert drawing.startswith(("flowchart ", "sequenceDiagram\n"))
        assert drawing.count('"') % 2 == 0
        for left, right in ("[]", "()"):
            assert drawing.count(left) == drawing.count(right)
        blocks = len(re.findall(r"^\s*(?:subgraph|par|alt|loop)\b", drawing, re.MULTILINE))
        assert len(re.findall(r"^\s*end$", drawing, re.MULTILINE)) == blocks


NAMES = ("core", "wire", "rpc", "handoff", "engine", "worker", "client", "cli", *SERVICES)
PART = "|".join(NAMES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    """Such as `scheduler/relay.py`, `core.batching` and `tests/e2e/test_faults.py`."""
    packages = {part.name: part.package for part in parts()}
    text = _text(document)
    gone = [
        name
        for name, part, rest in re.findall(rf"`(({PART})/([a-z_0-9/]+\.py))`", text)
        if not (packages.get(part, ROOT) / rest).is_file()
    ]
    gone += [
        name
        for name, part, rest in re.findall(rf"`(({PART})\.([a-z_0-9.]+))`", text)
        if not any(_module(packages.get(part, ROOT), rest))
    ]
    gone += [
        name for name in re.findall(r"`(tests/[\w/]+\.py)`", text) if not (ROOT / name).exists()
    ]
    assert gone == [], f"{document.name} names what is gone; write the new names"


def _module(package: Path, name: str) -> list[bool]:
    place = package / name.replace(".", "/")
    # A file of data, such as `tokenizer.json`, is not of the product.
    return [place.with_suffix(".py").is_file(), place.is_dir(), name in {"json", "proto"}]

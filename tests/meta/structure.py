"""Writes docs/structure.md: each file of the product in its own first sentence.

make structure      # or: python -m tests.meta.structure
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from tests.support.repository import ROOT, SERVICES, parts, tracked_files

PAGE = ROOT / "docs" / "structure.md"
COMMAND = ".venv/bin/python -m tests.meta.structure"
# From the bottom up, as imports go; a part that is not named here comes before the services.
ORDER = ("protos", "core", "wire", "rpc", "handoff", "engine", "worker", "client", "cli")
SUFFIXES = {".py", ".c", ".h", ".js", ".css", ".html", ".proto"}
HEAD = """# Structure

Every file of the product, in the words of its own first line. `make structure` writes this page; a
test holds it to them. [architecture.md](architecture.md) says how the parts work together.
"""
_COMMENT = re.compile(r"/\*.*?\*/|<!--.*?-->|(?:^//.*\n)+", re.DOTALL | re.MULTILINE)


def page() -> str:
    """The page as it should be now."""
    names = [part.name for part in parts()]
    shared = [name for name in names if name not in SERVICES]
    known = [name for name in ORDER if name in shared]
    lines = [HEAD]
    for name in [*known, *sorted({*shared} - {*known}), *SERVICES]:
        folder = next(part.folder for part in parts() if part.name == name)
        lines.append(f"## {name}: `{folder.relative_to(ROOT)}`\n")
        lines += [_line(path, folder) for path in _files(folder) if sentence(path)]
        lines.append("")
    return "\n".join(lines)


def _files(folder: Path) -> list[Path]:
    generated = ("_pb2.py", "_pb2_grpc.py")
    return sorted(
        path
        for path in tracked_files()
        if folder in path.parents and path.suffix in SUFFIXES and not path.name.endswith(generated)
    )


def _line(path: Path, folder: Path) -> str:
    place = path.relative_to(folder)
    shown = Path(*place.parts[2:]) if place.parts[0] == "baton" and len(place.parts) > 2 else place
    return f"- [`{shown}`](../{path.relative_to(ROOT)}): {sentence(path)}"


def sentence(path: Path) -> str:
    """A file's first line: of its docstring, or of its first comment; "" where it has neither."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
        return docstring.partition("\n")[0].strip()
    if not (comment := _COMMENT.search(text)):
        return ""
    words = " ".join(
        re.sub(r"^\s*(?://|/?\*|<!--)|\*/|-->", "", comment[0], flags=re.MULTILINE).split()
    )
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0]


def main() -> int:
    """Entry point."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where things are in this repository, and who depends on whom."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "tokenizer", "scheduler", "prefill", "decode", "cache")
TORCH_SERVICES = ("prefill", "decode")
STUBS = ("_pb2.py", "_pb2_grpc.py")
"""Ends of the names of what protoc writes."""
GENERATED_MARK = "# Generated from "
"""Begins the first line of a file that another one of ours is made into (`make sync`)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One distribution."""

    name: str
    """Such as "core"; its import name is `baton.<name>` (`baton.v1` for "protos")."""
    folder: Path

    @property
    def package(self) -> Path:
        """Folder of its modules."""
        return self.folder / "baton" / ("v1" if self.name == "protos" else self.name)

    @property
    def project(self) -> dict[str, object]:
        """Its pyproject.toml."""
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))

    def modules(self) -> list[Path]:
        """Its own modules, without generated ones."""
        return [path for path in self.all_modules() if not is_generated(path)]

    def all_modules(self) -> list[Path]:
        """Its modules without protoc's, but with those that `make sync` writes."""
        found = sorted(self.package.rglob("*.py"))
        return [path for path in found if not path.name.endswith(STUBS)]


def is_generated(path: Path) -> bool:
    """True when the first line says that the file is made from another."""
    with path.open(encoding="utf-8") as file:
        return file.readline().startswith(GENERATED_MARK)


def parts() -> list[Part]:
    """All distributions."""
    shared = sorted(path.parent for path in (ROOT / "shared").glob("*/pyproject.toml"))
    services = [ROOT / "services" / name for name in SERVICES]
    return [Part(folder.name, folder) for folder in (ROOT / "protos", *shared, *services)]


def tracked_files() -> list[Path]:
    """Files that git tracks or would track (what a clone has)."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, timeout=30,
    ).stdout.decode()  # fmt: skip
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def imported_modules(source: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names

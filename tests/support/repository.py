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
GENERATED = (
    *("_pb2.py", "_pb2_grpc.py"),
    *("client/sync_client.py", "client/sync_stream.py", "inference/blocking.py"),
)
"""Ends of the paths of files that are made from others."""


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
        found = sorted(self.package.rglob("*.py"))
        return [path for path in found if not path.as_posix().endswith(GENERATED)]


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

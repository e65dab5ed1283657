"""The training text: the running interpreter's standard library, split in two.

The split depends only on file contents and relative paths: the same Python gives the same one. Run
as a script it prints the split and, with `--write`, stores the held-out list with its checksums.
"""

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HELDOUT_LIST = Path(__file__).parent / "heldout.json"
HELDOUT_ONE_IN = 8
"""One in this many eligible modules is held out, by hash of its path."""
MAX_SHARED_LINES = 0.15
"""A module with a larger share of its longer lines found in any other file is never held out."""
MIN_HELDOUT_BYTES, MAX_HELDOUT_BYTES = 2_000, 60_000
MIN_LINE_CHARS = 16
"""Shorter lines (`return None`) occur everywhere and say nothing about copying."""
MAX_TABLE_BYTES = 6_000
"""Codec modules above this are generated character tables, which teach nothing about code."""
MAX_ANSWER_CHARS = 2_500
SYSTEM_PROMPT = "You write Python."
"""Opens every third chat, so that both kinds are known to the model."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module of the standard library."""

    path: str
    """Relative to the library's root, with forward slashes."""
    text: str

    @property
    def sha256(self) -> str:
        """Checksum of the file's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Length of the file in UTF-8."""
        return len(self.text.encode())

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to a test suite."""
        return any(part.startswith(("test", "idle_test")) for part in Path(self.path).parts)

    @property
    def long_lines(self) -> set[str]:
        """The distinct lines that are long enough to be telling."""
        lines = (line.strip() for line in self.text.splitlines())
        return {line for line in lines if len(line) >= MIN_LINE_CHARS}


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out files; no file, and no near-copy of one, is in both."""

    train: list[SourceFile]
    heldout: list[SourceFile]


def stdlib_files(root: Path | None = None) -> list[SourceFile]:
    """Read every UTF-8 `.py` file that a person wrote, each content once, in path order."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files: dict[str, SourceFile] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or relative.name.startswith("_sysconfigdata"):
            continue
        if relative.parts[0] == "encodings" and path.stat().st_size > MAX_TABLE_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            file = SourceFile(relative.as_posix(), text)
            files.setdefault(file.sha256, file)
    return sorted(files.values(), key=lambda file: file.path)


def split(files: list[SourceFile]) -> Split:
    """Hold out an eighth of the eligible modules: no tests, no tables, no copies of other files."""
    seen_in = Counter(line for file in files for line in file.long_lines)
    heldout = [file for file in files if _is_drawn(file) and not _is_copied(file, seen_in)]
    held_paths = {file.path for file in heldout}
    return Split([file for file in files if file.path not in held_paths], heldout)


def _is_drawn(file: SourceFile) -> bool:
    if file.is_test or not MIN_HELDOUT_BYTES <= file.num_bytes <= MAX_HELDOUT_BYTES:
        return False
    if file.path.startswith(("encodings/", "pydoc_data/")):
        return False
    digest = hashlib.sha256(file.path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0


def _is_copied(file: SourceFile, seen_in: Counter[str]) -> bool:
    lines = file.long_lines
    shared = sum(seen_in[line] > 1 for line in lines)
    return shared > MAX_SHARED_LINES * len(lines)


def chat_examples(files: list[SourceFile]) -> list[list[dict[str, str]]]:
    """Make requests and answers of documented functions, so that the chat tokens mean something."""
    chats: list[list[dict[str, str]]] = []
    for file in files:
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            continue
        lines = file.text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            doc = ast.get_docstring(node)
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if doc and len(source) <= MAX_ANSWER_CHARS:
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                request = f"Write the {kind} `{node.name}`. {doc.splitlines()[0]}"
                opening = [{"role": "system", "content": SYSTEM_PROMPT}]
                chats.append([
                    *(opening if len(chats) % 3 == 0 else []),
                    {"role": "user", "content": request},
                    {"role": "assistant", "content": _dedent(source, node.col_offset)},
                ])
    return chats


def _dedent(source: str, columns: int) -> str:
    margin = " " * columns
    return "\n".join(line.removeprefix(margin) for line in source.split("\n"))


def heldout_files() -> list[SourceFile]:
    """Read the listed held-out files that this interpreter has with unchanged content."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for entry in json.loads(HELDOUT_LIST.read_text())["files"]:
        path = root / entry["path"]
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() == entry["sha256"]:
            files.append(SourceFile(entry["path"], content.decode()))
    return files


def main() -> None:
    """Print the split; with `--write`, store the held-out list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the held-out list")
    arguments = parser.parse_args()
    parts = split(stdlib_files())
    for file in parts.heldout:
        sys.stdout.write(f"{file.num_bytes:8,}  {file.path}\n")
    for name, files in (("train", parts.train), ("held out", parts.heldout)):
        num_bytes = sum(file.num_bytes for file in files)
        sys.stdout.write(f"{name}: {len(files)} files, {num_bytes:,} bytes\n")
    if arguments.write:
        entries = [
            {"path": file.path, "num_bytes": file.num_bytes, "sha256": file.sha256}
            for file in parts.heldout
        ]
        python = sys.version.split()[0]
        HELDOUT_LIST.write_text(json.dumps({"python": python, "files": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()

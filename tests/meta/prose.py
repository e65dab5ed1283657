"""Lints the prose of the documents with proselint: without code, tables' bars and drawings.

python -m tests.meta.prose      # part of `make lint`
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from proselint.checks import __register__
from proselint.config import DEFAULT, Config
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

from tests.support.repository import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_WORDS = 45
# Not of use for technical text in plain ASCII, each with its reason.
SWITCHED_OFF = {
    "typography.symbols.curly_quotes": "straight quotes are what terminals and diffs show",
    "typography.symbols.ellipsis": "so are three dots",
}


def findings(path: Path) -> list[str]:
    """`file:line: check: message` of all that proselint finds in a document's prose."""
    text = LintFile(str(path.relative_to(ROOT)), prose_of(path.read_text(encoding="utf-8")))
    return [
        f"{path.relative_to(ROOT)}:{found.pos[0]}: {found.check_result.check_path}: "
        f"{found.check_result.message}"
        for found in text.lint(_CONFIG)
    ]


def long_sentences(path: Path) -> list[str]:
    """`file:line: words` of each sentence with more than MAX_WORDS, tables aside."""
    text = re.sub(r"^\s*\|.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found, number = [], 1
    # A paragraph, an item of a list or a heading ends a sentence, too.
    for block in re.split(r"(\n(?=\n|\s*- |\s*\d+\. |Heading))", prose_of(text)):
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(block.split()))
        found += [
            f"{path.relative_to(ROOT)}:{number}: {len(sentence.split())} words: {sentence[:60]}..."
            for sentence in sentences
            if len(sentence.split()) > MAX_WORDS
        ]
        number += block.count("\n")
    return found


def prose_of(text: str) -> str:
    """The document without code, targets of links and figures; lines stay where they are."""
    text = re.sub(r"^( *)```.*?^\1```", _blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "CODE", text)
    text = re.sub(r"\]\([^)\s]*\)", "]", text)
    text = re.sub(r"^ {4}\S.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\|.*$", _cells, text, flags=re.MULTILINE)
    # A heading and the paragraph below it are no repetition.
    return re.sub(r"^#+ (.*)$", r"Heading: \1.", text, flags=re.MULTILINE)


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def _cells(match: re.Match[str]) -> str:
    """Cells of words as sentences; cells of figures not at all."""
    cells = [cell.strip() for cell in match[0].split("|")]
    return ". ".join(cell for cell in cells if re.search(r"[a-z]{3}.* [a-z]{2}", cell))


def _config() -> Config:
    CheckRegistry().register_many(__register__)
    # The first entry that names a check, or a family of checks, decides.
    switched_off = dict.fromkeys(SWITCHED_OFF, False)
    return {**DEFAULT, "checks": {**switched_off, **DEFAULT["checks"]}}


_CONFIG = _config()


def main() -> int:
    """Entry point."""
    lines = [line for path in DOCUMENTS for line in findings(path) + long_sentences(path)]
    sys.stderr.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

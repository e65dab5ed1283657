"""The documents' prose passes proselint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.meta import prose


@pytest.mark.parametrize("document", prose.DOCUMENTS, ids=lambda path: path.name)
def test_proselint_is_content(document: Path) -> None:
    lines = prose.findings(document)
    assert lines == [], "\n" + "\n".join(lines)


@pytest.mark.parametrize("document", prose.DOCUMENTS, ids=lambda path: path.name)
def test_sentences_are_short(document: Path) -> None:
    lines = prose.long_sentences(document)
    assert lines == [], "\n" + "\n".join(lines)


def test_prose_is_read_and_code_is_not() -> None:
    text = "A very unique word.\n\n```sh\necho very unique\n```\n\nSee `the the` there.\n"
    assert "very unique word" in prose.prose_of(text)
    assert "echo" not in prose.prose_of(text)
    assert prose.prose_of(text).count("\n") == text.count("\n")

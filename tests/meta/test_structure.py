"""docs/structure.md has every file of the product, in its own words."""

from __future__ import annotations

from tests.meta import structure


def test_the_page_is_current() -> None:
    assert structure.PAGE.is_file(), f"run: {structure.COMMAND}"
    written = structure.PAGE.read_text(encoding="utf-8").splitlines()
    differing = sorted({*written} ^ {*structure.page().splitlines()})
    assert differing == [], "\n".join(["", *differing, f"run: {structure.COMMAND}"])


def test_every_file_has_a_sentence() -> None:
    silent = []
    for part in structure.parts():
        files = structure._files(part.folder)
        silent += [path for path in files if path.name != "__init__.py"]
    missing = [
        str(path.relative_to(structure.ROOT)) for path in silent if not structure.sentence(path)
    ]
    assert missing == []

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from baton.cli.ask import make_guide
from baton.client import Guide

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


def test_a_schema_comes_from_a_file_or_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    expected = Guide.json_schema(SCHEMA)
    assert make_guide(str(file), "", None, None) == expected
    assert make_guide(json.dumps(SCHEMA), "", None, None) == expected


def test_the_other_kinds(tmp_path: Path) -> None:
    grammar = tmp_path / "answer.lark"
    grammar.write_text('start: "yes"')
    assert make_guide("", "[a-z]+", None, None) == Guide.regex("[a-z]+")
    assert make_guide("", "", grammar, None) == Guide.lark('start: "yes"')
    assert make_guide("", "", None, ["yes", "no"]) == Guide.choice(["yes", "no"])
    assert make_guide("", "", None, None) is None


@pytest.mark.parametrize(
    ("given", "text"), [("no-such-file", "neither"), ("{broken", "neither"), ("[1]", "neither")]
)
def test_a_bad_schema_is_refused_here(given: str, text: str) -> None:
    with pytest.raises(typer.BadParameter, match=text):
        make_guide(given, "", None, None)


def test_a_schema_must_be_an_object(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text("[1]")
    with pytest.raises(typer.BadParameter, match="object"):
        make_guide(str(file), "", None, None)


def test_two_guides_are_one_too_many() -> None:
    with pytest.raises(typer.BadParameter, match="only one of --regex, --choice"):
        make_guide("", "x", None, ["y"])

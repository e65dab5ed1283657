"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.target import ADDRESS_VARIABLE
from baton.client import Guide

Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        help="Scheduler, HOST:PORT. Default: the system that runs here.",
        envvar=ADDRESS_VARIABLE,
        show_envvar=True,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelName = Annotated[str, typer.Option("--model", help="Model name, where several are served.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to produce.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Keep only the k most likely; 0 keeps all.")]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Keep the fewest that reach probability p.")
]
MinP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Drop those below p times the likeliest.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same text.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.")
]
Speculation = Annotated[
    bool | None,
    typer.Option("--speculation/--no-speculation", help="Draft tokens ahead, or do not."),
]
JsonSchema = Annotated[
    str, typer.Option(help="Output must fulfil this JSON schema: a file, or JSON itself.")
]
Regex = Annotated[str, typer.Option(help="Output must match this regular expression.")]
Grammar = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Output must follow this file's Lark grammar."),
]
Choice = Annotated[
    list[str] | None,
    typer.Option("--choice", help="Output must be one of these; repeat it for each."),
]


def make_guide(
    json_schema: str, regex: str, grammar: Path | None, choice: Sequence[str] | None
) -> Guide | None:
    """What the output must match, None for anything.

    Raises:
        typer.BadParameter: more than one was given, or the schema is not JSON.
    """
    given = [
        name
        for name, value in (
            ("--json-schema", json_schema),
            ("--regex", regex),
            ("--grammar", grammar),
            ("--choice", choice),
        )
        if value
    ]
    if len(given) > 1:
        raise typer.BadParameter(f"give only one of {', '.join(given)}")
    if json_schema:
        return Guide.json_schema(_read_schema(json_schema))
    if regex:
        return Guide.regex(regex)
    if grammar is not None:
        return Guide.lark(grammar.read_text(encoding="utf-8"))
    return Guide.choice(choice) if choice else None


def _read_schema(given: str) -> dict[str, object]:
    is_text = given.lstrip().startswith("{")
    try:
        text = given if is_text else Path(given).read_text(encoding="utf-8")
        schema = json.loads(text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"--json-schema is neither a JSON file nor JSON: {error}"
        ) from None
    if not isinstance(schema, dict):
        raise typer.BadParameter("--json-schema must be a JSON object")
    return schema

"""`baton generate`: a completion, streamed to the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from baton.cli.stages import print_stages
from baton.client import Client, Completion, GenerateOptions, TextStream


class Interrupted(Exception):
    """Ctrl-C while an answer was streaming; what had come so far is in `completion`."""

    def __init__(self, completion: Completion) -> None:
        super().__init__("interrupted")
        self.completion = completion


def stream_to(console: Console, stream: TextStream) -> Completion:
    """Prints text as it comes.

    Raises:
        Interrupted: Ctrl-C; the request is cancelled everywhere.
        BatonError: the request failed.
    """
    try:
        with stream:
            for chunk in stream:
                write(console, chunk.text)
    except KeyboardInterrupt:
        raise Interrupted(stream.completion) from None
    return stream.completion


def generate(
    client: Client, console: Console, prompt: str, options: GenerateOptions, *, as_json: bool
) -> None:
    """Streams one completion; with `as_json` prints one JSON document at the end instead.

    Raises:
        Interrupted, BatonError: see `stream_to`.
    """
    if options.get("explain"):
        # The breakdown is about the request: the connection's set-up would blur it.
        client.models()
    if as_json:
        completion = client.generate(prompt, **options)
        console.print_json(json.dumps(to_document(completion)))
        return
    completion = stream_to(console, client.generate(prompt, stream=True, **options))
    write(console, "\n")
    if options.get("explain"):
        console.print()
        print_stages(console, completion)


def to_document(completion: Completion) -> dict[str, Any]:
    """A completion as `--json` prints it."""
    document = asdict(completion)
    for entry in document["logprobs"]:
        _drop_bytes(entry)
    return document


def write(console: Console, text: str) -> None:
    """Text as it is: no markup, no wrapping, at once."""
    console.file.write(text)
    console.file.flush()


def _drop_bytes(entry: dict[str, Any]) -> None:
    """Bytes are no JSON; the text beside them says the same where it is whole UTF-8."""
    entry.pop("token_bytes", None)
    for other in entry.get("top", ()):
        other.pop("token_bytes", None)

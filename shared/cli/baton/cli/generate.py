"""`baton generate`: a completion, streamed to the terminal."""

from __future__ import annotations

from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from rich.console import Console

from baton.cli.stages import print_stages
from baton.client import Client, Completion, GenerateOptions, TextStream

_PICTURES = MappingProxyType(
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | {code: f"\\x{code:x}" for code in range(0x80, 0xA0)}
)
"""A visible symbol for each control character except line breaks and tabs."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while an answer was streaming; `completion` holds the part that had arrived."""

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
        console.print_json(data=to_document(completion))
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
        for each in (entry, *entry["top"]):
            # Bytes are not JSON; the text beside them says the same where it is whole UTF-8.
            del each["token_bytes"]
    return document


def write(console: Console, text: str) -> None:
    """Writes text at once, without markup or wrapping; on a terminal, with visible control codes.

    A model may produce escape sequences, which could set titles, clipboards and colours.
    """
    console.file.write(text.translate(_PICTURES) if console.is_terminal else text)
    console.file.flush()

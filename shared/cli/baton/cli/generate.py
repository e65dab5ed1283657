"""`baton generate` and `baton chat`: a completion or a conversation, streamed to the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console

from baton.cli.stages import print_stages
from baton.client import Client, Completion, GenerateOptions, TextStream

_CHAT_HELP = "/stats shows the last answer's stages, /new forgets the conversation, /quit ends"


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
                _write(console, chunk.text)
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
    _write(console, "\n")
    if options.get("explain"):
        console.print()
        print_stages(console, completion)


def chat(client: Client, console: Console, options: GenerateOptions) -> None:
    """A conversation until /quit or end of input. Ctrl-C ends an answer, not the conversation."""
    messages: list[Mapping[str, str]] = []
    last: Completion | None = None
    console.print(_CHAT_HELP, style="dim")
    _turn_on_line_editing()
    while True:
        try:
            line = console.input("[bold]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        if line == "/new":
            messages.clear()
        elif line == "/stats":
            _print_stats(console, last)
        elif line.startswith("/"):
            console.print(_CHAT_HELP, style="dim")
        elif line:
            messages.append({"role": "user", "content": line})
            last = _answer(client, console, messages, options)
            messages.append({"role": "assistant", "content": last.text})


def to_document(completion: Completion) -> dict[str, Any]:
    """A completion as `--json` prints it."""
    document = asdict(completion)
    for entry in document["logprobs"]:
        _drop_bytes(entry)
    return document


def _answer(
    client: Client,
    console: Console,
    messages: list[Mapping[str, str]],
    options: GenerateOptions,
) -> Completion:
    turn = options.copy()
    turn["messages"] = messages
    stream = client.generate(stream=True, **turn)
    try:
        completion = stream_to(console, stream)
    except Interrupted as interrupted:
        completion = interrupted.completion
        _write(console, " …")
    _write(console, "\n")
    return completion


def _print_stats(console: Console, last: Completion | None) -> None:
    if last is None or not last.stages:
        console.print("no answer yet", style="dim")
    else:
        print_stages(console, last)


def _write(console: Console, text: str) -> None:
    """Text as it is: no markup, no wrapping, at once."""
    console.file.write(text)
    console.file.flush()


def _drop_bytes(entry: dict[str, Any]) -> None:
    """Bytes are no JSON; the text beside them says the same where it is whole UTF-8."""
    entry.pop("token_bytes", None)
    for other in entry.get("top", ()):
        other.pop("token_bytes", None)


def _turn_on_line_editing() -> None:
    """Arrow keys and a history of lines, where the platform has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - importing it is what turns it on

"""Errors that the user can mend: one line, what to do next, and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType

import typer
from rich.console import Console

from baton.client import BatonError, Cancelled, ErrorReason

EXIT_INTERRUPTED = 130
_NEXT = MappingProxyType({
    ErrorReason.MODEL_NOT_FOUND: "`baton status` shows the models that are served",
    ErrorReason.UNAUTHENTICATED: "the commands send the key that BATON_API_KEY holds",
    ErrorReason.NO_WORKER: "`baton status` shows who is there, `baton doctor` what is wrong",
    ErrorReason.QUEUE_FULL: "wait, or add workers: `baton up --decode 2`",
    ErrorReason.KV_CACHE_FULL: "wait, lower --max-tokens, or give more room: `baton up --kv-bytes`",
    ErrorReason.DEADLINE: "raise --timeout-s, or lower --max-tokens",
    ErrorReason.INTERNAL: "the service's log has the details: `baton doctor` says where",
})


class UserError(Exception):
    """The user can mend this; the message says how."""


@contextmanager
def explained(console: Console | None = None) -> Iterator[None]:
    """Ends the command with one line, on standard error by default, where the user can help."""
    console = console or Console(stderr=True)
    try:
        yield
    except (KeyboardInterrupt, Cancelled):
        console.print("\ninterrupted: the request was cancelled", style="yellow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        raise  # The reader of the output has enough: typer ends quietly.
    except (UserError, BatonError, OSError) as error:
        text = described(error) if isinstance(error, BatonError) else str(error)
        console.print("error:", style="bold red", end=" ")
        console.print(text, markup=False, highlight=False)
        raise typer.Exit(1) from error


def described(error: BatonError) -> str:
    """An error as one line, with what to do about it where that is known."""
    retry = f" (retry in {error.retry_after_s:g} s)" if error.retry_after_s else ""
    text = f"{error.reason.name.lower()}: {error.message}{retry}"
    return f"{text}; {_NEXT[error.reason]}" if error.reason in _NEXT else text

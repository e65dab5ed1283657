"""Errors that a user can do something about: one line, what to do next, and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import NoReturn

import typer
from rich.console import Console

from baton.cli.generate import Interrupted
from baton.cli.models import NoModel
from baton.cli.plan import PlanError
from baton.cli.rundir import AlreadyRunning
from baton.cli.target import NoSystem
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


@contextmanager
def explained(console: Console) -> Iterator[None]:
    """Turns such errors into a line and an exit status."""
    try:
        yield
    except (AlreadyRunning, NoModel, NoSystem, PlanError) as error:
        fail(console, str(error))
    except (Interrupted, KeyboardInterrupt, Cancelled):
        console.print("\ninterrupted: the request was cancelled", style="yellow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BatonError as error:
        fail(console, described(error))
    except BrokenPipeError:
        raise  # whoever read the output has enough of it: typer ends quietly
    except OSError as error:
        fail(console, str(error))


def described(error: BatonError) -> str:
    """An error as one line, with what to do about it where that is known."""
    retry = f" (retry in {error.retry_after_s:g} s)" if error.retry_after_s else ""
    text = f"{error.reason.name.lower()}: {error.message}{retry}"
    return f"{text}; {_NEXT[error.reason]}" if error.reason in _NEXT else text


def fail(console: Console, text: str) -> NoReturn:
    """Says what is wrong and ends the command with status 1."""
    console.print("error:", style="bold red", end=" ")
    console.print(text, markup=False, highlight=False)
    raise typer.Exit(1)

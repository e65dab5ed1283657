"""Finds the system to talk to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from baton.cli.rundir import run_directory
from baton.cli.user_errors import UserError, explained
from baton.client import Client
from baton.core.roles import Role

ADDRESS_VARIABLE = "BATON_ADDRESS"


class NoSystem(UserError):
    """No system answers."""


def scheduler_address(given: str) -> str:
    """Address of the scheduler: as given, else $BATON_ADDRESS, else that of the local system.

    Raises:
        NoSystem: none is given and none runs here.
    """
    if address := given or os.environ.get(ADDRESS_VARIABLE, ""):
        return address
    state = run_directory().running()
    scheduler = state.process(Role.SCHEDULER) if state else None
    if scheduler is None:
        raise NoSystem(
            "no Baton runs here: start one with `baton up`, or name a scheduler with"
            f" --address HOST:PORT (or {ADDRESS_VARIABLE})"
        )
    return scheduler.address


@contextmanager
def scheduler_client(address: str, timeout_s: float = 600.0) -> Iterator[Client]:
    """A client of the scheduler, for one command; a failure ends the command with one line."""
    with explained(), Client(scheduler_address(address), timeout_s=timeout_s) as client:
        yield client

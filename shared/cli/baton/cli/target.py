"""Finds the system to talk to."""

from __future__ import annotations

import os

from baton.cli.rundir import RunDirectory

ADDRESS_VARIABLE = "BATON_ADDRESS"


class NoSystem(Exception):
    """There is no system to talk to; the message says what to do."""


def scheduler_address(given: str, run: RunDirectory) -> str:
    """Address of the scheduler: as given, else $BATON_ADDRESS, else that of the local system.

    Raises:
        NoSystem: none is given and none runs here.
    """
    if address := given or os.environ.get(ADDRESS_VARIABLE, ""):
        return address
    state = run.running()
    scheduler = state.process("scheduler") if state else None
    if scheduler is None:
        raise NoSystem(
            "no Baton runs here: start one with `baton up`, or name a scheduler with"
            f" --address HOST:PORT (or {ADDRESS_VARIABLE})"
        )
    return scheduler.address

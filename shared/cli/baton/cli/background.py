"""The detached supervisor, as started by `baton up --detach`."""

from __future__ import annotations

import json
import sys

from baton.cli.plan import UpOptions
from baton.cli.rundir import RunDirectory, run_directory
from baton.cli.supervisor import StopRequested
from baton.cli.up import EXIT_FAILED, EXIT_OK, local_system, stop_on_signals
from baton.cli.user_errors import EXIT_INTERRUPTED, UserError


def run_background(run_id: str, options: UpOptions, run: RunDirectory) -> int:
    """The detached supervisor's whole life; it reports through the state file."""
    with stop_on_signals() as stop:
        try:
            with local_system(options, run, run_id, stop, lambda _state: None) as supervisor:
                supervisor.watch()
        except StopRequested:
            return EXIT_INTERRUPTED
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    _, run_id, document = sys.argv
    sys.exit(run_background(run_id, UpOptions(**json.loads(document)), run_directory()))

"""The detached supervisor, as started by `baton up --detach`."""

from __future__ import annotations

import json
import sys

from baton.cli.rundir import run_directory
from baton.cli.up import options_from, run_background

if __name__ == "__main__":
    run_id, document = sys.argv[1:]
    sys.exit(run_background(run_id, options_from(json.loads(document)), run_directory()))

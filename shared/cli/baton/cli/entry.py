"""The `baton` command."""

from __future__ import annotations

import signal
from importlib import import_module


def main() -> None:
    """Runs the command; Ctrl-C while it still loads ends it without a traceback."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    app = import_module(".main", __package__).app
    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()

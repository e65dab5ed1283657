"""Runs a command that dies with its parent: ``python -I -S child.py PARENT_PID COMMAND...``.

The supervisor starts every process through this file. It asks the kernel for SIGKILL at the
parent's death (Linux; elsewhere the command is just run), then becomes the command: the request
survives the exec. Standard library only, and nothing else loaded: it runs before each service.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
PARENT_GONE_EXIT_CODE = 75


def main(argv: list[str]) -> None:
    """Becomes the command; ends with 75 when the parent is gone already."""
    parent_pid = int(argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            sys.exit(PARENT_GONE_EXIT_CODE)
    os.execv(argv[2], argv[2:])


if __name__ == "__main__":
    main(sys.argv)

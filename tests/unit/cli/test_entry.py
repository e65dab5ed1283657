"""Ctrl-C before the command has been loaded, and after."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, types
from importlib.abc import MetaPathFinder

class CtrlC(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "baton.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

def app():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("handled")

if "loading" in sys.argv:
    sys.meta_path.insert(0, CtrlC())
else:
    sys.modules["baton.cli.main"] = types.SimpleNamespace(app=app)
from baton.cli.entry import main
main()
"""


@pytest.mark.parametrize(
    ("when", "status", "out"), [("loading", -signal.SIGINT, ""), ("running", 0, "handled\n")]
)
def test_ctrl_c_shows_no_traceback(when: str, status: int, out: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, when],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (status, out, "")

"""The blocking SDK is what its generator makes of the asyncio one."""

from __future__ import annotations

import subprocess
import sys

from tests.support.repository import ROOT


def test_the_blocking_sdk_is_fresh() -> None:
    generator = ROOT / "shared" / "client" / "make_sync.py"
    result = subprocess.run(
        [sys.executable, generator, "--check"],
        capture_output=True, text=True, timeout=55, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr

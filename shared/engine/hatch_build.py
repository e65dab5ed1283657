"""Compiles baton/engine/native/*.c to one library when the package is built or installed.

Where it cannot, for want of a C compiler or of an x86-64 Linux, the package works without: the
engine then computes by oneDNN, and says so when it starts on a CPU that could do better. With
BATON_REQUIRE_KERNELS=1 in the environment the build fails instead. By hand:

    python shared/engine/hatch_build.py
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path(__file__).parent / "baton/engine/native"
_TIMEOUT_S = 120
# No option names a CPU: the functions that need its instructions say so themselves.
_OPTIONS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-fPIC", "-shared", "-fopenmp")


def compile_kernels() -> str:
    """Compiles beside the sources; returns why it could not, or nothing."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"no kernels for {platform.system()} on {platform.machine()}"
    sources = sorted(NATIVE.glob("*.[ch]"))
    # kernels.py compares this with the sources that it finds, so that a stale library is not used.
    version = zlib.crc32(b"".join(source.read_bytes() for source in sources))
    # Put in place by one rename, so that a process that starts meanwhile finds all or nothing.
    unfinished = NATIVE / f"kernels.{os.getpid()}.so"
    command = [os.environ.get("CC", "cc"), *_OPTIONS, f"-DVERSION={version}u", "-o"]
    command += [str(path) for path in (unfinished, *NATIVE.glob("*.c"))]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        unfinished.replace(NATIVE / "kernels.so")
    except subprocess.CalledProcessError as error:
        return f"{command[0]} failed:\n{error.stderr}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} did not run: {error}"
    finally:
        unfinished.unlink(missing_ok=True)
    return ""


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatch calls it for wheels and editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and marks the wheel as one for this platform."""
        del version
        failure = compile_kernels()
        if failure and os.environ.get("BATON_REQUIRE_KERNELS") == "1":
            raise RuntimeError(f"BATON_REQUIRE_KERNELS=1, and the kernels are missing: {failure}")
        if failure:
            self.app.display_warning(f"without compiled kernels: {failure}")
            return
        build_data["artifacts"].append("baton/engine/native/*.so")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"


if __name__ == "__main__":
    sys.exit(compile_kernels() or None)

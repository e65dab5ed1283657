"""What a process holds of the memory that transports use."""

from __future__ import annotations

import gc
from pathlib import Path


def num_held(pid: int | None = None) -> int:
    """Descriptors and mappings of such memory in a process, or in this one."""
    gc.collect()
    process = Path("/proc") / ("self" if pid is None else str(pid))
    names = (process / "maps").read_text(encoding="utf-8").splitlines()
    for descriptor in (process / "fd").iterdir():
        if descriptor.is_symlink():  # not closed meanwhile
            names.append(str(descriptor.readlink()))
    return sum("baton-kv" in name for name in names)


def mapped(pid: int) -> set[str]:
    """Inodes of such memory that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return {line.split()[4] for line in lines if "baton-kv" in line}

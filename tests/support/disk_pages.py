"""Opens copies of a store of which one page is lost: `python -m tests.support.disk_pages FILE`.

In processes of its own, since LMDB ends the process that walks into some of them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from baton.cache.disk import PAGE_BYTES, DamagedRecord, DiskStore
from tests.support.kv_blocks import make_block, name

BUDGET_BYTES = 1 << 20
NUM_BLOCKS = 40
_WRONG = 1


def _open(folder: Path) -> int:
    store = DiskStore(folder, BUDGET_BYTES)
    for number in range(NUM_BLOCKS):
        try:
            block = store.read(name(number))
        except DamagedRecord:
            continue
        if block not in {None, make_block(number)}:
            return _WRONG
    store.close()
    return 0


def _exit_code(folder: Path) -> int:
    child = os.fork()
    if child == 0:
        os._exit(_open(folder))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Says for each lost page how the processes ended that opened the store, up to a good end."""
    logging.disable(logging.CRITICAL)
    content = Path(sys.argv[1]).read_bytes()
    ends = []
    for start in range(0, len(content), PAGE_BYTES):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "0", "blocks.lmdb")
            file.parent.mkdir()
            rest = content[start + PAGE_BYTES :]
            file.write_bytes(content[:start] + bytes(PAGE_BYTES) + rest)
            codes = [_exit_code(Path(scratch))]
            if codes[0] < 0:
                codes.append(_exit_code(Path(scratch)))
            ends.append(codes)
    sys.stdout.write(json.dumps(ends))


if __name__ == "__main__":
    main()

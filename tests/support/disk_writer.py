"""Writes blocks to a DiskStore until it is killed: `python -m tests.support.disk_writer FOLDER`."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from baton.cache.disk import DiskStore
from baton.core.hashing import KvLayout
from tests.support.kv_blocks import make_block, name

LAYOUT = KvLayout.one_group(block_size=16, dtype="float32", num_kv_heads=(2, 2), head_dim=(32, 32))
BUDGET_BYTES = 8 << 20
BATCH = 4
KEPT = 48


def main() -> None:
    """Says after each transaction which block was the last; removes old ones as it goes."""
    store = DiskStore(Path(sys.argv[1]), BUDGET_BYTES)
    for start in count(int(sys.argv[2]), BATCH):
        numbers = range(start, start + BATCH)
        old = [name(number - KEPT) for number in numbers if number >= KEPT]
        store.write([make_block(number, layout=LAYOUT) for number in numbers], old)
        sys.stdout.write(f"{start + BATCH - 1}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

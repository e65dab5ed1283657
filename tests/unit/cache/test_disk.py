"""Blocks on disk: whatever happens to the file or the process, only what was stored comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cache import disk
from baton.cache.disk import DamagedRecord, DiskEntry, DiskError, DiskStore, disk_bytes
from baton.core.errors import InvalidRequest
from baton.core.eviction import ChainLink
from tests.support import disk_pages
from tests.support.disk_writer import BATCH, BUDGET_BYTES, KEPT, LAYOUT
from tests.support.kv_blocks import make_block, name, payload

BUDGET = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    opened = DiskStore(tmp_path / "disk", BUDGET)
    yield opened
    opened.close()


def flip(file: Path, found: bytes, at: int) -> None:
    """Changes one byte of the file, `at` bytes after the only place where `found` is."""
    content = bytearray(file.read_bytes())
    assert content.count(found) == 1
    content[content.index(found) + at] ^= 1
    file.write_bytes(content)


def test_block_comes_back_as_it_went_in_also_after_a_restart(tmp_path: Path) -> None:
    block = make_block(1, ChainLink(name(9), 3))
    store = DiskStore(tmp_path, BUDGET)
    store_id = store.store_id
    store.write([block], [])
    assert store.read(name(1)) == block
    assert store.read(name(2)) is None
    store.close()
    again = DiskStore(tmp_path, BUDGET)
    assert again.store_id == store_id
    assert again.read(name(1)) == block
    entry = DiskEntry(name(1), block.link, block.layout.block_size, disk_bytes(len(block.payload)))
    assert list(again.scan()) == [entry]
    again.close()


def test_removed_and_cleared_blocks_are_gone(store: DiskStore) -> None:
    store_id = store.store_id
    store.write([make_block(1), make_block(2)], [])
    store.write([make_block(3)], [name(1), name(77)])
    assert store.read(name(1)) is None
    store.clear()
    assert list(store.scan()) == []
    store.write([make_block(1)], [])
    store.close()
    again = DiskStore(store.folder.parent, BUDGET)
    assert again.store_id == store_id
    again.close()
    store._lock = os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize("what", [payload(1), name(77).hex().encode()])
def test_damaged_content_or_description_is_never_returned(tmp_path: Path, what: bytes) -> None:
    store = DiskStore(tmp_path, BUDGET)
    store.write([make_block(1, ChainLink(name(77), 3)), make_block(2)], [])
    store.close()
    flip(store.folder / "blocks.lmdb", what, 20)
    again = DiskStore(tmp_path, BUDGET)
    with pytest.raises(DamagedRecord):
        again.read(name(1))
    assert again.read(name(2)) == make_block(2)
    assert len(list(again.scan())) == 2
    is_description = what != payload(1)
    assert (name(1) in list(again.scan())) == is_description, "reported without reading payloads"
    again.close()


def test_file_that_is_no_store_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "blocks.lmdb").write_bytes(b"not a store" * 2000)
    store = DiskStore(tmp_path, BUDGET)
    assert list(store.scan()) == []
    store.write([make_block(1)], [])
    store.close()
    assert (tmp_path / "0" / "blocks.damaged").exists()


def test_file_that_was_cut_short_is_set_aside(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, BUDGET)
    store.write([make_block(number, layout=LAYOUT) for number in range(20)], [])
    store.close()
    os.truncate(tmp_path / "0" / "blocks.lmdb", 5 * 4096)
    again = DiskStore(tmp_path, BUDGET)
    assert list(again.scan()) == []
    again.close()


def test_a_lost_page_costs_blocks_and_at_most_one_start(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, disk_pages.BUDGET_BYTES)
    for number in range(disk_pages.NUM_BLOCKS):
        store.write([make_block(number)], [])
    store.write([], [name(number) for number in range(0, disk_pages.NUM_BLOCKS, 7)])
    store.close()
    command = [sys.executable, "-m", "tests.support.disk_pages", store.folder / "blocks.lmdb"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    ends = json.loads(done.stdout)
    assert len(ends) > 10
    assert [codes for codes in ends if codes not in ([0], [-signal.SIGABRT, 0])] == []


def test_file_at_whose_opening_a_process_ended_is_set_aside(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, BUDGET)
    store.write([make_block(1)], [])
    store.close()
    (store.folder / "opening").touch()
    for _ in range(2):
        again = DiskStore(tmp_path, BUDGET)
        assert list(again.scan()) == []
        again.close()
    assert (store.folder / "blocks.damaged").exists()
    assert not (store.folder / "opening").exists()


def test_full_file_is_an_error_and_changes_nothing(store: DiskStore) -> None:
    store.write([make_block(1)], [])
    with pytest.raises(DiskError):
        store.write([make_block(number, layout=LAYOUT) for number in range(2, 200)], [name(1)])
    assert store.read(name(1)) == make_block(1)
    assert store.read(name(2)) is None


def test_other_users_cannot_read_what_is_stored(tmp_path: Path) -> None:
    DiskStore(tmp_path, BUDGET).close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert {path.stat().st_mode & 0o077 for path in files} == {0}


def test_two_processes_share_a_folder_and_no_file(tmp_path: Path) -> None:
    first, second = DiskStore(tmp_path, BUDGET), DiskStore(tmp_path, BUDGET)
    assert first.folder != second.folder
    assert first.store_id != second.store_id
    first.close()
    third = DiskStore(tmp_path, BUDGET)
    assert (third.folder, third.store_id) == (first.folder, first.store_id)
    second.close()
    third.close()


def test_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="disk_path"):
        DiskStore(tmp_path / "file", BUDGET)


def test_record_written_for_another_key_is_damaged(store: DiskStore) -> None:
    store.write([make_block(7)], [])
    with store._env.begin(write=True) as txn:
        txn.put(name(5), disk._description(make_block(1)), db=store._about)
        txn.put(name(5), payload(1), db=store._payloads)
        txn.put(name(6), b"short", db=store._about)
        txn.delete(name(7), db=store._payloads)
    for number in (5, 6, 7):
        with pytest.raises(DamagedRecord):
            store.read(name(number))


def test_killed_while_writing_it_opens_with_whole_transactions_only(tmp_path: Path) -> None:
    last = -1
    for num_lines in (1, 7, 30):
        with subprocess.Popen(
            [sys.executable, "-m", "tests.support.disk_writer", str(tmp_path), str(last + 1)],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            said = [int(writer.stdout.readline()) for _ in range(num_lines)]
            writer.send_signal(signal.SIGKILL)
            said += [int(line) for line in writer.stdout if line.endswith("\n")]
            assert writer.wait(10) == -signal.SIGKILL
        store = DiskStore(tmp_path, BUDGET_BYTES)
        found = sorted(
            int.from_bytes(entry.block_hash)
            for entry in store.scan()
            if not isinstance(entry, bytes)
        )
        assert found[-1] >= said[-1], "what was said to be written is there"
        last = found[-1]
        assert (last + 1) % BATCH == 0, "half a transaction is there"
        assert found == list(range(max(0, last + 1 - KEPT), last + 1))
        for number in found:
            assert store.read(name(number)) == make_block(number, layout=LAYOUT)
        assert (store.folder / "blocks.lmdb").stat().st_size <= BUDGET_BYTES
        store.close()


def test_a_record_names_a_layout_as_those_of_older_versions_do() -> None:
    layout = '"layout":{"block_size":2,"dtype":"float32","num_kv_heads":[1,1],"head_dim":[4,4]}'
    assert layout.encode() in disk._description(make_block(1))

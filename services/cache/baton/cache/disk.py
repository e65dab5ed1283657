"""KV blocks in a file: LMDB, read through a memory map, written by copy-on-write transactions.

A process that is killed at any instant leaves a store that opens with its last finished
transaction. Each record carries checksums over its key, its description and its payload, checked on
every read, so that only what was stored is ever returned. All methods block: for threads.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import lmdb
import xxhash

from baton.cache.store import StoredBlock
from baton.core.errors import InvalidRequest
from baton.core.eviction import ChainLink
from baton.core.hashing import HASH_BYTES, KvLayout

logger = logging.getLogger(__name__)

DiskError = lmdb.Error
"""What reading and writing raise."""
PAGE_BYTES = 4096
_FILE = "blocks.lmdb"
_LOCK = "lock"
_OPENING = "opening"
_MAX_REPLICAS = 256
_ID_KEY = b"store_id"
_NOTE_KEY = b"note"
_PREFIX = struct.Struct("<4sQQ")
"""Magic and version, checksum of key and description, checksum of the payload."""
_MAGIC = b"BKV1"
_USABLE = 0.8
"""Part of the budget that records may take: a transaction writes before it frees."""
MIN_BUDGET_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """What is known of a record without reading its payload."""

    block_hash: bytes
    link: ChainLink
    block_size: int
    num_bytes: int
    """What it takes from the budget."""


class DamagedRecord(Exception):
    """A record is not what was stored."""


class DiskStore:
    """One replica's blocks on disk. Reads from any thread, writes from one at a time."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        """Takes the first folder `folder/0`, `folder/1`, … that no other process holds.

        Raises:
            InvalidRequest: the folder cannot be used.
        """
        self.folder, self._lock = _claim(folder)
        self.usable_bytes = int(budget_bytes * _USABLE)
        # Never smaller than the file is, and then with room to delete in.
        file = self.folder / _FILE
        held_bytes = file.stat().st_size if file.exists() else 0
        size = budget_bytes if held_bytes <= budget_bytes else int(held_bytes / _USABLE)
        self._map_bytes = max(size, MIN_BUDGET_BYTES) // PAGE_BYTES * PAGE_BYTES
        self.store_id, self.note = self._open(file)

    def scan(self) -> Iterator[DiskEntry | bytes]:
        """All records' descriptions, or the key of one whose description is damaged.

        Payloads are not touched: they are what takes time to read.
        """
        with self._env.begin(db=self._about, buffers=True) as txn:
            for key, value in txn.cursor():
                block_hash = bytes(key)
                try:
                    layout, link, _ = _described(block_hash, bytes(value))
                except DamagedRecord:
                    yield block_hash
                else:
                    num_bytes = disk_bytes(layout.block_bytes)
                    yield DiskEntry(block_hash, link, layout.block_size, num_bytes)

    def write(self, blocks: Sequence[StoredBlock], removed: Sequence[bytes]) -> None:
        """Removes some records and writes others, all or nothing.

        Raises:
            DiskError: it did not work; nothing has changed.
        """
        with self._env.begin(write=True) as txn:
            for block_hash in removed:
                txn.delete(block_hash, db=self._about)
                txn.delete(block_hash, db=self._payloads)
            for block in blocks:
                txn.put(block.block_hash, _description(block), db=self._about)
                txn.put(block.block_hash, block.payload, db=self._payloads)

    def read(self, block_hash: bytes) -> StoredBlock | None:
        """The block, verified; None when there is none.

        Raises:
            DamagedRecord: it is not what was stored.
            DiskError: it could not be read.
        """
        with self._env.begin(buffers=True) as txn:
            about = txn.get(block_hash, db=self._about)
            if about is None:
                return None
            layout, link, checksum = _described(block_hash, bytes(about))
            # The one copy out of the map: it may be overwritten once the transaction is over.
            payload = bytes(txn.get(block_hash, b"", db=self._payloads))
        block = StoredBlock(block_hash, layout, checksum, payload, link)
        if len(payload) != layout.block_bytes or not block.is_intact:
            raise DamagedRecord
        return block

    def clear(self) -> None:
        """Removes all records."""
        with self._env.begin(write=True) as txn:
            txn.drop(self._about, delete=False)
            txn.drop(self._payloads, delete=False)

    def save_note(self, text: str) -> None:
        """Keeps a text beside the blocks.

        Raises:
            DiskError: it did not work.
        """
        with self._env.begin(write=True) as txn:
            txn.put(_NOTE_KEY, text.encode(), db=self._own)
        self.note = text

    def close(self) -> None:
        """Lets go of the files."""
        self._env.close()
        os.close(self._lock)

    def _open(self, file: Path) -> tuple[str, str]:
        """Opens the file; one that cannot be used is set aside for an empty one.

        So is one at whose opening the process ended: LMDB gives up so when a tree is damaged.
        """
        mark = self.folder / _OPENING
        if mark.exists() and file.exists():
            _set_aside(file, "a process ended while it opened them")
        mark.touch(0o600)
        try:
            own = self._attach(file)
        except DiskError as error:
            _set_aside(file, str(error))
            own = self._attach(file)
        mark.unlink()
        return own

    def _attach(self, file: Path) -> tuple[str, str]:
        """Opens the file and walks its trees, payloads apart; returns what `_load_own` does."""
        # metasync=False: a power cut may lose the last transaction, and damages none before it.
        # mode: prompts can be read out of their KV, so it is for this user alone.
        self._env = lmdb.open(
            str(file),
            map_size=self._map_bytes,
            subdir=False,
            metasync=False,
            mode=0o600,
            max_dbs=3,
        )
        try:
            info, page_bytes = self._env.info(), self._env.stat()["psize"]
            if file.stat().st_size < (info["last_pgno"] + 1) * page_bytes:
                # Before any page is touched: one that is not there ends the process.
                raise lmdb.CorruptedError("the file is shorter than it says")
            self._env.reader_check()
            self._own = self._env.open_db(b"own")
            self._about = self._env.open_db(b"about")
            self._payloads = self._env.open_db(b"payloads")
            with self._env.begin() as txn:
                for tree in (self._about, self._payloads):
                    deque(txn.cursor(db=tree).iternext(values=False), maxlen=0)
            return self._load_own()
        except DiskError:
            self._env.close()
            raise

    def _load_own(self) -> tuple[str, str]:
        """The store's id, made when there is none, and the note."""
        with self._env.begin(write=True) as txn:
            store_id = txn.get(_ID_KEY, db=self._own)
            if store_id is None:
                store_id = uuid4().hex[:16].encode()
                txn.put(_ID_KEY, store_id, db=self._own)
            note = txn.get(_NOTE_KEY, b"", db=self._own)
            return bytes(store_id).decode(errors="replace"), bytes(note).decode(errors="replace")


def _set_aside(file: Path, error: str) -> None:
    logger.error("stored blocks cannot be read, set aside", extra={"error": error})
    file.replace(file.with_suffix(".damaged"))


def disk_bytes(payload_bytes: int) -> int:
    """What a block takes in the file: whole pages, and one for its description and the trees."""
    pages = -(-(payload_bytes + HASH_BYTES) // PAGE_BYTES)
    return (pages + 1) * PAGE_BYTES


def _claim(folder: Path) -> tuple[Path, int]:
    """The first folder that is free, and the lock that keeps it until this process ends."""
    try:
        for number in range(_MAX_REPLICAS):
            own = folder / str(number)
            own.mkdir(parents=True, exist_ok=True)
            lock = os.open(own / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                return own, lock
    except OSError as error:
        raise InvalidRequest(f"disk_path {folder} cannot be used: {error}") from error
    raise InvalidRequest(f"all {_MAX_REPLICAS} folders of {folder} are in use")


_LAYOUT_FIELDS = ("block_size", "dtype", "num_kv_heads", "head_dim")
"""As records name them since before layouts had groups."""


def _description(block: StoredBlock) -> bytes:
    described = {
        "layout": {name: getattr(block.layout, name) for name in _LAYOUT_FIELDS},
        "parent": block.link.parent.hex(),
        "position": block.link.position,
    }
    text = json.dumps(described, separators=(",", ":")).encode()
    checksum = xxhash.xxh3_64_intdigest(block.block_hash + text)
    return _PREFIX.pack(_MAGIC, checksum, block.checksum) + text


def _described(block_hash: bytes, about: bytes) -> tuple[KvLayout, ChainLink, int]:
    """Layout, link, and the payload's checksum.

    Raises:
        DamagedRecord: this does not describe that block.
    """
    if len(about) < _PREFIX.size:
        raise DamagedRecord
    magic, expected, checksum = _PREFIX.unpack_from(about)
    text = about[_PREFIX.size :]
    if magic != _MAGIC or xxhash.xxh3_64_intdigest(block_hash + text) != expected:
        raise DamagedRecord
    fields = json.loads(text)
    layout = fields["layout"]
    return (
        KvLayout.one_group(
            layout["block_size"],
            layout["dtype"],
            tuple(layout["num_kv_heads"]),
            tuple(layout["head_dim"]),
        ),
        ChainLink(bytes.fromhex(fields["parent"]), fields["position"]),
        checksum,
    )

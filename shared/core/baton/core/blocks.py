"""Who owns each KV block of a worker, and which blocks hold what prefix.

A block's state is derived from three facts: references by sequences (use), references by kept
copies (hold), and whether its content is in the prefix cache (a hash). Blocks that one sequence
owns for KV from elsewhere carry a stage besides. `check()` states the invariants.

    FREE -> RESERVED -> FILLING -> READY -> IN_USE -> (HELD) -> CACHED -> FREE
    an aborted transfer: RESERVED | FILLING -> QUARANTINED -> FREE
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from baton.core.errors import KvCacheFull


class BlockState(Enum):
    """State of a block; the value is the metric's label."""

    FREE = "free"
    RESERVED = "reserved"
    FILLING = "filling"
    READY = "ready"
    IN_USE = "in_use"
    HELD = "held"
    CACHED = "cached"
    QUARANTINED = "quarantined"


STAGES = frozenset({
    BlockState.RESERVED,
    BlockState.FILLING,
    BlockState.READY,
    BlockState.IN_USE,
})
"""States that a sole owner may set."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Blocks of one sequence that another one of the same tokens uses too."""

    shared: list[int]
    """Full blocks, which are no longer written."""
    source: int | None
    """The partly filled one behind them: the newcomer copies it before its first write. Until then
    it has a separate reference, which the newcomer releases."""


@dataclass(slots=True)
class _Block:
    epoch: int = 0
    """Counts allocations."""
    num_uses: int = 0
    num_holds: int = 0
    stage: BlockState = BlockState.IN_USE
    """Meaning while in use; QUARANTINED also without any reference."""
    block_hash: bytes | None = None
    state: BlockState = BlockState.FREE


class BlockPool:
    """Accounting of `num_blocks` blocks. Not thread-safe: the engine's lock guards it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"need at least one block of one token, got {num_blocks=} {block_size=}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Blocks in state CACHED, least recently used first."""
        self._by_hash: dict[bytes, int] = {}
        self.num_evictions = 0
        """Hashes removed so far: while it stays, a match can only grow."""
        self._counts = dict.fromkeys(BlockState, 0)
        self._counts[BlockState.FREE] = num_blocks
        self._changes: dict[bytes, bool] = {}
        """Net difference of `_by_hash` since the last drain: True is stored, False removed."""

    @property
    def num_available(self) -> int:
        """Blocks that an allocation can take: free, or cached and not referenced."""
        return len(self._free) + len(self._cached)

    def counts(self) -> dict[str, int]:
        """Blocks by lower-case state name; the values sum to `num_blocks`."""
        return {state.value: count for state, count in self._counts.items()}

    def state(self, block_id: int) -> BlockState:
        """State of a block."""
        return self._blocks[block_id].state

    def epoch(self, block_id: int) -> int:
        """How often the block was allocated."""
        return self._blocks[block_id].epoch

    def is_shared(self, block_id: int) -> bool:
        """True if more than one owner references the block."""
        block = self._blocks[block_id]
        return block.num_uses + block.num_holds > 1

    def allocate(self, num_blocks: int, stage: BlockState = BlockState.IN_USE) -> list[int]:
        """Takes blocks, free ones first, then the least recently used cached ones.

        Raises:
            KvCacheFull: fewer are available; nothing was taken.
        """
        _check_stage(stage)
        if num_blocks > self.num_available:
            raise KvCacheFull(
                f"{num_blocks} KV blocks are needed and {self.num_available} of "
                f"{self.num_blocks} are available; retry later or on another worker"
            )
        taken = []
        for _ in range(num_blocks):
            block_id = self._free.pop() if self._free else self._evict()
            block = self._blocks[block_id]
            block.epoch += 1
            block.num_uses = 1
            block.stage = stage
            self._set_state(block, stage)
            taken.append(block_id)
        return taken

    def set_stage(self, block_ids: Iterable[int], stage: BlockState) -> None:
        """Moves blocks of a sole owner on. Shared and cached blocks can only be IN_USE."""
        _check_stage(stage)
        for block_id in block_ids:
            block = self._blocks[block_id]
            is_private = block.num_uses == 1 and block.num_holds == 0 and block.block_hash is None
            if is_private or (stage is BlockState.IN_USE and block.num_uses):
                block.stage = stage
                self._set_state(block, stage)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks that hold the leading hashes. Takes no reference."""
        found = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks are cached only: taking them makes fewer available."""
        return sum(self._blocks[block_id].state is BlockState.CACHED for block_id in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Takes one more use reference on blocks with content."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            self._cached.pop(block_id, None)
            block.num_uses += 1
            block.stage = BlockState.IN_USE
            self._set_state(block, BlockState.IN_USE)

    def fork(self, block_ids: Sequence[int], num_tokens: int) -> Fork:
        """Takes one more use reference on the blocks that hold the first `num_tokens` tokens.

        The owner goes on writing behind those tokens, in the partly filled block too: a copy made
        at any time has all that the newcomer needs of it.
        """
        num_full, num_rest = divmod(num_tokens, self.block_size)
        wanted = block_ids[: num_full + bool(num_rest)]
        if len(wanted) < num_full + bool(num_rest):
            raise ValueError(f"{len(block_ids)} blocks do not hold {num_tokens} tokens")
        self.share(wanted)
        return Fork(list(wanted[:num_full]), wanted[num_full] if num_rest else None)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Offers a full block in use to the prefix cache. A second copy of a hash stays private."""
        block = self._used(block_id)
        if block.block_hash is not None or block_hash in self._by_hash:
            return
        block.block_hash = block_hash
        self._by_hash[block_hash] = block_id
        self._note(block_hash, is_stored=True)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Takes blocks out of the prefix cache, as their content is wrong; references stay."""
        for block_id in block_ids:
            self._forget(self._blocks[block_id])

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives back one use reference each; the last blocks will be evicted first."""
        for block_id in reversed(block_ids):
            block = self._used(block_id)
            block.num_uses -= 1
            self._settle(block_id, block)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Turns one use reference each into a hold reference."""
        for block_id in block_ids:
            block = self._used(block_id)
            block.num_uses -= 1
            block.num_holds += 1
            self._settle(block_id, block)

    def release_hold(self, block_ids: Sequence[int]) -> None:
        """Gives back one hold reference each."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.num_holds == 0:
                raise ValueError(f"block {block_id} is {block.state.value}: it is not held")
            block.num_holds -= 1
            self._settle(block_id, block)

    def quarantine(self, block_ids: Sequence[int]) -> list[int]:
        """Releases blocks, those of a sole owner without cached content into quarantine.

        Returns:
            The quarantined blocks. The caller passes them to `end_quarantine` once no writer is
            left.
        """
        quarantined = []
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.num_uses == 1 and block.num_holds == 0 and block.block_hash is None:
                block.num_uses = 0
                block.stage = BlockState.QUARANTINED
                self._set_state(block, BlockState.QUARANTINED)
                quarantined.append(block_id)
            else:
                self.release([block_id])
        return quarantined

    def end_quarantine(self, block_ids: Iterable[int]) -> None:
        """Frees quarantined blocks."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.state is not BlockState.QUARANTINED:
                raise ValueError(f"block {block_id} is {block.state.value}, not quarantined")
            block.stage = BlockState.IN_USE
            self._settle(block_id, block)

    def hashes(self) -> list[bytes]:
        """Hashes of all blocks that can be found here."""
        return list(self._by_hash)

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes stored and hashes removed since the last call: the net difference."""
        stored = [block_hash for block_hash, is_stored in self._changes.items() if is_stored]
        removed = [block_hash for block_hash, is_stored in self._changes.items() if not is_stored]
        self._changes.clear()
        return stored, removed

    def check(self) -> None:
        """Verifies the invariants.

        Raises:
            ValueError: one does not hold (a defect).
        """
        counted = dict.fromkeys(BlockState, 0)
        for block_id, block in enumerate(self._blocks):
            counted[block.state] += 1
            _require(block.state is _derive(block), f"block {block_id} is {block.state}: {block}")
            _require(block.num_uses >= 0 and block.num_holds >= 0, f"negative count: {block}")
            if block.block_hash is not None:
                _require(self._by_hash.get(block.block_hash) == block_id, f"lost hash: {block}")
        _require(counted == self._counts, f"counts: {counted} is not {self._counts}")
        _require(sum(counted.values()) == self.num_blocks, f"a block is lost: {counted}")
        _require(len(set(self._free)) == len(self._free), "a block is free twice")
        for ids, state in ((self._free, BlockState.FREE), (self._cached, BlockState.CACHED)):
            _require(len(ids) == counted[state], f"the list of {state.value} blocks is wrong")
            _require(
                all(self.state(i) is state for i in ids), f"a listed block is not {state.value}"
            )
        with_hash = sum(block.block_hash is not None for block in self._blocks)
        _require(with_hash == len(self._by_hash), "a hash names a block that does not have it")

    def _used(self, block_id: int) -> _Block:
        block = self._blocks[block_id]
        if block.num_uses == 0:
            raise ValueError(f"block {block_id} is {block.state.value}: it has no user")
        return block

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._forget(self._blocks[block_id])
        return block_id

    def _forget(self, block: _Block) -> None:
        if block.block_hash is not None:
            del self._by_hash[block.block_hash]
            self.num_evictions += 1
            self._note(block.block_hash, is_stored=False)
            block.block_hash = None

    def _settle(self, block_id: int, block: _Block) -> None:
        """Sets the state after a reference went away."""
        state = _derive(block)
        self._set_state(block, state)
        if state is BlockState.FREE:
            self._free.append(block_id)
        elif state is BlockState.CACHED:
            self._cached[block_id] = None

    def _set_state(self, block: _Block, state: BlockState) -> None:
        self._counts[block.state] -= 1
        self._counts[state] += 1
        block.state = state

    def _note(self, block_hash: bytes, *, is_stored: bool) -> None:
        # Stored and removed (or the reverse) since the last drain cancel out, which also bounds
        # the dictionary by twice the number of blocks.
        if self._changes.pop(block_hash, is_stored) is is_stored:
            self._changes[block_hash] = is_stored


def _derive(block: _Block) -> BlockState:
    if block.num_uses:
        return block.stage
    if block.num_holds:
        return BlockState.HELD
    if block.block_hash is not None:
        return BlockState.CACHED
    return BlockState.QUARANTINED if block.stage is BlockState.QUARANTINED else BlockState.FREE


def _check_stage(stage: BlockState) -> None:
    if stage not in STAGES:
        raise ValueError(f"{stage.value} is not a state that an owner can set")


def _require(is_true: bool, message: str) -> None:  # noqa: FBT001
    if not is_true:
        raise ValueError(message)

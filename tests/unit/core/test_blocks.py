from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.blocks import BlockPool, BlockState
from baton.core.errors import KvCacheFull


def _hash(index: int) -> bytes:
    return index.to_bytes(16, "big")


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(3)
    with pytest.raises(KvCacheFull, match="2 KV blocks are needed and 1 of 4"):
        pool.allocate(2)
    assert pool.num_available == 1
    pool.check()


def test_each_allocation_has_a_new_epoch() -> None:
    pool = BlockPool(1, 16)
    (block,) = pool.allocate(1)
    first = pool.epoch(block)
    pool.release([block])
    assert pool.allocate(1) == [block]
    assert pool.epoch(block) == first + 1


def test_a_released_block_with_content_is_found_and_shared() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], _hash(1))
    pool.release(blocks)
    assert pool.counts()["cached"] == 1
    assert pool.counts()["free"] == 3
    assert pool.match([_hash(1), _hash(2)]) == [blocks[0]]
    assert pool.num_unreferenced([blocks[0]]) == 1
    pool.share([blocks[0]])
    pool.share([blocks[0]])
    assert pool.is_shared(blocks[0])
    assert pool.counts()["in_use"] == 1
    pool.release([blocks[0]])
    assert pool.state(blocks[0]) is BlockState.IN_USE
    pool.check()


def test_the_least_recently_used_is_evicted_and_a_chain_from_its_end() -> None:
    pool = BlockPool(3, 16)
    chain = pool.allocate(2)
    for index, block in enumerate(chain):
        pool.publish(block, _hash(index))
    pool.release(chain)
    pool.allocate(2)
    assert pool.match([_hash(0), _hash(1)]) == [chain[0]]
    pool.allocate(1)
    assert pool.match([_hash(0)]) == []
    pool.check()


def test_changes_are_the_net_difference() -> None:
    pool = BlockPool(1, 16)
    (block,) = pool.allocate(1)
    pool.publish(block, _hash(1))
    assert pool.drain_changes() == ([_hash(1)], [])
    pool.release([block])
    pool.allocate(1)
    pool.publish(block, _hash(2))
    pool.release([block])
    pool.allocate(1)
    assert pool.drain_changes() == ([], [_hash(1)])
    assert pool.drain_changes() == ([], [])


def test_stages_of_a_hand_off() -> None:
    pool = BlockPool(4, 16)
    cached = pool.allocate(1)
    pool.publish(cached[0], _hash(0))
    pool.release(cached)
    pool.share(cached)
    table = cached + pool.allocate(2, BlockState.RESERVED)
    assert pool.counts() | {"free": 1, "in_use": 1, "reserved": 2} == pool.counts()
    pool.set_stage(table, BlockState.FILLING)
    assert pool.counts()["filling"] == 2
    pool.set_stage(table, BlockState.READY)
    pool.publish(table[1], _hash(1))
    assert pool.counts()["ready"] == 2
    pool.set_stage(table, BlockState.IN_USE)
    assert pool.counts()["in_use"] == 3
    pool.hold(table)
    assert pool.counts()["held"] == 3
    pool.release_hold(table)
    assert pool.counts() | {"cached": 2, "free": 2} == pool.counts()
    pool.check()


def test_quarantined_blocks_cannot_be_taken_until_it_ends() -> None:
    pool = BlockPool(3, 16)
    shared = pool.allocate(1)
    pool.publish(shared[0], _hash(0))
    table = shared + pool.allocate(2, BlockState.FILLING)
    quarantined = pool.quarantine(table)
    assert quarantined == table[1:]
    assert pool.counts() | {"cached": 1, "quarantined": 2} == pool.counts()
    with pytest.raises(KvCacheFull):
        pool.allocate(2)
    pool.end_quarantine(quarantined)
    assert pool.num_available == 3
    pool.check()


def test_a_fork_shares_full_blocks_and_borrows_the_partly_filled_one() -> None:
    pool = BlockPool(8, 16)
    table = pool.allocate(3)
    forks = [pool.fork(table, 40) for _ in range(3)]
    assert [fork.shared for fork in forks] == [table[:2]] * 3
    assert [fork.source for fork in forks] == [table[2]] * 3
    assert pool.counts()["in_use"] == 3, "no block for a prompt that is there"
    own = [pool.allocate(1)[0] for _ in forks]
    for fork in forks:
        pool.release([table[2]])
        assert fork.source == table[2]
    assert not pool.is_shared(table[2])
    assert pool.is_shared(table[0])
    assert pool.counts()["in_use"] == 6
    pool.release(table)
    for fork, block in zip(forks, own, strict=True):
        pool.release([*fork.shared, block])
    assert pool.counts()["free"] == 8
    assert pool.fork([], 0).source is None
    with pytest.raises(ValueError, match="1 blocks do not hold 17 tokens"):
        pool.fork(pool.allocate(1), 17)
    pool.check()


@pytest.mark.parametrize("name", ["release", "hold", "release_hold", "end_quarantine"])
def test_giving_back_what_is_not_owned_is_refused(name: str) -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(ValueError, match="block 0 is free"):
        getattr(pool, name)([0])
    pool.check()


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(2, 16)
    pool._free.pop()
    with pytest.raises(ValueError, match="free blocks is wrong"):
        pool.check()


class BlockPoolMachine(RuleBasedStateMachine):
    """Owners come and go at random; the model is a list of tables."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.tables: list[list[int]] = []
        self.held: list[list[int]] = []
        self.quarantined: list[list[int]] = []
        self.known: set[bytes] = set()
        self.next_hash = 0

    @rule(count=st.integers(0, 6), stage=st.sampled_from([BlockState.IN_USE, BlockState.RESERVED]))
    def allocate(self, count: int, stage: BlockState) -> None:
        available = self.pool.num_available
        if count > available:
            with pytest.raises(KvCacheFull):
                self.pool.allocate(count, stage)
            assert self.pool.num_available == available
        else:
            self.tables.append(self.pool.allocate(count, stage))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), fresh=st.booleans())
    def publish(self, data: st.DataObject, fresh: bool) -> None:
        table = data.draw(st.sampled_from(self.tables))
        for block in table:
            self.next_hash += fresh
            self.pool.publish(block, _hash(self.next_hash))

    @rule(index=st.integers(0, 30))
    def share(self, index: int) -> None:
        found = self.pool.match([_hash(index), _hash(index + 1)])
        self.pool.share(found)
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num_copies=st.integers(1, 3), is_copied=st.booleans())
    def fork(self, data: st.DataObject, num_copies: int, is_copied: bool) -> None:
        table = data.draw(st.sampled_from(self.tables))
        num_tokens = data.draw(st.integers(0, len(table) * 4))
        for _ in range(num_copies):
            fork = self.pool.fork(table, num_tokens)
            sources = [] if fork.source is None else [fork.source]
            assert [*fork.shared, *sources] == table[: -(-num_tokens // 4)]
            if is_copied and self.pool.num_available:
                fork.shared.extend(self.pool.allocate(len(sources)))
                self.pool.release(sources)
            else:
                fork.shared.extend(sources)
            self.tables.append(fork.shared)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), way=st.sampled_from(["release", "hold", "quarantine", "stage"]))
    def let_go(self, data: st.DataObject, way: str) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        if way == "stage":
            self.pool.set_stage(self.tables[index], BlockState.FILLING)
            return
        table = self.tables.pop(index)
        if way == "release":
            self.pool.release(table)
        elif way == "hold":
            self.pool.hold(table)
            self.held.append(table)
        else:
            self.quarantined.append(self.pool.quarantine(table))

    @precondition(lambda self: self.held)
    @rule()
    def release_hold(self) -> None:
        self.pool.release_hold(self.held.pop())

    @precondition(lambda self: self.quarantined)
    @rule()
    def end_quarantine(self) -> None:
        self.pool.end_quarantine(self.quarantined.pop())

    @rule()
    def drain(self) -> None:
        stored, removed = self.pool.drain_changes()
        assert self.known.isdisjoint(stored)
        assert self.known.issuperset(removed)
        self.known = (self.known - set(removed)) | set(stored)
        assert self.known == set(self.pool.hashes())

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        counts = self.pool.counts()
        owned = {block for table in self.tables for block in table}
        held = {block for table in self.held for block in table} - owned
        quarantined = sum(len(table) for table in self.quarantined)
        assert sum(counts.values()) == self.pool.num_blocks
        assert counts["held"] == len(held)
        assert counts["quarantined"] == quarantined
        in_use = ("in_use", "reserved", "filling", "ready")
        assert sum(counts[name] for name in in_use) == len(owned)


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

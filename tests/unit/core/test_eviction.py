"""Eviction: chains lose their ends first, the cheap and unused before the dear and used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.core.eviction import ChainLink, EvictionOrder, recompute_cost

BLOCK_SIZE = 16


def chain_keys(name: str, length: int) -> list[bytes]:
    return [f"{name}{index}".encode() for index in range(length)]


def add_chain(order: EvictionOrder, name: str, length: int) -> list[bytes]:
    keys = chain_keys(name, length)
    for position, key in enumerate(keys):
        link = ChainLink(keys[position - 1] if position else b"", position)
        order.add(key, link, cost=recompute_cost(position, BLOCK_SIZE), num_bytes=1000)
    return keys


def test_later_blocks_cost_more_to_recompute() -> None:
    costs = [recompute_cost(position, BLOCK_SIZE) for position in range(2000)]
    assert costs == sorted(set(costs))
    assert recompute_cost(1024, BLOCK_SIZE) == pytest.approx(2 * recompute_cost(0, BLOCK_SIZE))


def test_chain_is_given_up_from_its_end() -> None:
    order = EvictionOrder()
    keys = add_chain(order, "a", 5)
    assert [order.evict() for _ in range(6)] == [*reversed(keys), None]


def test_shared_start_outlives_all_branches() -> None:
    order = EvictionOrder()
    (root, *_) = add_chain(order, "r", 1)
    for name in (b"x", b"y"):
        order.add(name, ChainLink(root, 1), cost=1.0, num_bytes=1000)
    assert {order.evict(), order.evict()} == {b"x", b"y"}
    assert order.evict() == root


def test_unused_goes_before_used_and_old_use_fades() -> None:
    order = EvictionOrder()
    for name in (b"hot", b"cold"):
        order.add(name, ChainLink(), cost=10.0, num_bytes=10)
    for _ in range(3):
        order.use(b"hot")
    assert order.evict() == b"cold"
    # The clock moves on with every eviction: new blocks overtake what was popular once.
    for number in range(100):
        order.add(b"new%d" % number, ChainLink(), cost=10.0, num_bytes=10)
        assert order.evict() is not None
    assert b"hot" not in order


def test_dear_blocks_outlive_cheap_ones_of_the_same_age() -> None:
    order = EvictionOrder()
    order.add(b"dear", ChainLink(b"gone", 900), cost=recompute_cost(900, 16), num_bytes=10)
    order.add(b"cheap", ChainLink(), cost=recompute_cost(0, 16), num_bytes=10)
    assert order.evict() == b"cheap"


def test_large_blocks_go_before_small_ones_of_the_same_cost() -> None:
    order = EvictionOrder()
    order.add(b"small", ChainLink(), cost=1.0, num_bytes=10)
    order.add(b"large", ChainLink(), cost=1.0, num_bytes=100)
    assert order.evict() == b"large"


def test_pinned_block_stays_and_goes_when_all_its_pins_are_taken_back() -> None:
    order = EvictionOrder()
    keys = add_chain(order, "a", 2)
    order.pin(keys)
    order.pin(keys[:1])
    assert order.evict() is None
    order.unpin(keys)
    assert order.evict() == keys[1]
    assert order.evict() is None
    order.unpin(keys[:1])
    assert order.evict() == keys[0]


def test_kept_block_stays_a_candidate_for_later() -> None:
    order = EvictionOrder()
    (key,) = add_chain(order, "a", 1)
    assert order.evict(keep=key) is None
    assert order.evict() == key


def test_made_up_circle_of_parents_can_be_evicted() -> None:
    order = EvictionOrder()
    order.add(b"a", ChainLink(b"b", 1), cost=1.0, num_bytes=1)
    order.add(b"b", ChainLink(b"a", 2), cost=1.0, num_bytes=1)
    order.add(b"self", ChainLink(b"self", 1), cost=1.0, num_bytes=1)
    assert {order.evict() for _ in range(3)} == {b"a", b"b", b"self"}


class Life(RuleBasedStateMachine):
    """Against a model that looks at everything each time."""

    def __init__(self) -> None:
        super().__init__()
        self.order = EvictionOrder()
        self.links: dict[bytes, ChainLink] = {}
        self.priority: dict[bytes, float] = {}
        self.uses: dict[bytes, int] = {}
        self.pins: list[bytes] = []
        self.clock = 0.0

    def value(self, key: bytes) -> float:
        return recompute_cost(self.links[key].position, BLOCK_SIZE) / 100

    def leaves(self) -> list[bytes]:
        parents = {(link.parent, link.position - 1) for link in self.links.values() if link.parent}
        return [key for key, link in self.links.items() if (key, link.position) not in parents]

    @rule(name=st.sampled_from("ab"), depth=st.integers(0, 3))
    def add(self, name: str, depth: int) -> None:
        keys = chain_keys(name, 4)
        if keys[depth] in self.links:
            return
        link = ChainLink(keys[depth - 1] if depth else b"", depth)
        cost = recompute_cost(depth, BLOCK_SIZE)
        assert self.order.has_parent(link) == (depth == 0 or keys[depth - 1] in self.links)
        self.order.add(keys[depth], link, cost=cost, num_bytes=100)
        self.links[keys[depth]] = link
        self.uses[keys[depth]] = 1
        self.priority[keys[depth]] = self.clock + self.value(keys[depth])

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        if self.links:
            key = data.draw(st.sampled_from(sorted(self.links)))
            self.order.use(key)
            self.uses[key] += 1
            self.priority[key] = self.clock + self.uses[key] * self.value(key)

    @rule(name=st.sampled_from("ab"), depth=st.integers(0, 3))
    def pin(self, name: str, depth: int) -> None:
        self.pins.append(chain_keys(name, 4)[depth])
        self.order.pin(self.pins[-1:])

    @rule()
    def unpin(self) -> None:
        if self.pins:
            self.order.unpin([self.pins.pop(0)])

    @rule(keep=st.sampled_from([b"", b"a0", b"b3"]))
    def evict(self, keep: bytes) -> None:
        allowed = [key for key in self.leaves() if key not in self.pins and key != keep]
        victim = self.order.evict(keep)
        if not allowed:
            assert victim is None
            return
        assert victim in allowed
        assert self.priority[victim] == min(self.priority[key] for key in allowed)
        self.clock = max(self.clock, self.priority[victim])
        del self.links[victim]

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.links:
            key = data.draw(st.sampled_from(sorted(self.links)))
            self.order.remove(key)
            del self.links[key]

    @invariant()
    def same_blocks(self) -> None:
        assert len(self.order) == len(self.links)
        assert all(key in self.order for key in self.links)


test_order_equals_its_model = Life.TestCase


@given(uses=st.lists(st.integers(0, 9), max_size=400))
def test_heap_stays_in_proportion_to_the_blocks(uses: list[int]) -> None:
    order = EvictionOrder()
    keys = add_chain(order, "a", 10)
    for index in uses:
        order.use(keys[index])
    assert len(order._heap) <= 2 * len(order) + 64


def test_the_block_before_is_one_of_the_position_before() -> None:
    order = EvictionOrder()
    order.add(b"a", ChainLink(b"z", 5), cost=1.0, num_bytes=1)
    found = [order.has_parent(ChainLink(b"a", position)) for position in (5, 6, 7)]
    assert found == [False, True, False]
    assert order.has_parent(ChainLink(b"", 6)), "not known"

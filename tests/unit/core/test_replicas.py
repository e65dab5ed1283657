"""Rendezvous hashing: even shares, and a change of the replicas moves no more than it must."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from baton.core.replicas import owner

KEYS = [number.to_bytes(16, "big") for number in range(4000)]
NAMES = [f"replica-{number}" for number in range(5)]


def test_nobody_keeps_anything_where_there_is_none() -> None:
    assert owner([], b"key") is None


def test_shares_are_even() -> None:
    shares = Counter(owner(NAMES, key) for key in KEYS)
    assert set(shares) == set(NAMES)
    assert all(abs(share - 800) < 4 * 800**0.5 for share in shares.values())


def test_replica_that_leaves_gives_away_its_own_share_alone_and_evenly() -> None:
    gone, *left = NAMES
    taken: Counter[str | None] = Counter()
    for key in KEYS:
        before, after = owner(NAMES, key), owner(left, key)
        if before == gone:
            taken[after] += 1
        else:
            assert after == before
    assert all(abs(share - 200) < 4 * 200**0.5 for share in taken.values())
    assert set(taken) == set(left)


def test_replica_that_joins_takes_its_share_and_moves_nothing_else() -> None:
    moved = [key for key in KEYS if owner(NAMES[:4], key) != owner(NAMES, key)]
    assert all(owner(NAMES, key) == NAMES[4] for key in moved)
    assert abs(len(moved) - 800) < 4 * 800**0.5


@given(
    names=st.lists(st.text(max_size=20), unique=True, min_size=1, max_size=6),
    key=st.binary(max_size=80),
    data=st.data(),
)
def test_order_does_not_matter(names: list[str], key: bytes, data: st.DataObject) -> None:
    assert owner(data.draw(st.permutations(names)), key) == owner(names, key)

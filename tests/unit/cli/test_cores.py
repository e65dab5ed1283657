"""Cores are divided without overlap while there are enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.cli.cores import divide_cores, thread_environment


def test_neighbours_together_and_the_rest_to_the_first() -> None:
    assert divide_cores([0, 1, 2, 3, 4], 2) == [(0, 1, 2), (3, 4)]
    assert divide_cores([4, 6], 2) == [(4,), (6,)]


def test_with_fewer_cores_than_workers_they_take_turns() -> None:
    assert divide_cores([0, 1], 5) == [(0,), (1,), (0,), (1,), (0,)]


@given(cores=st.sets(st.integers(0, 255), min_size=1), num_workers=st.integers(0, 32))
def test_every_worker_gets_a_core_and_shares_are_fair(cores: set[int], num_workers: int) -> None:
    ordered = sorted(cores)
    shares = divide_cores(ordered, num_workers)
    assert len(shares) == num_workers
    assert all(shares)
    given_out = [core for share in shares for core in share]
    if 0 < num_workers <= len(cores):
        assert given_out == ordered
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert set(given_out) <= cores


def test_thread_count_is_set_for_every_numeric_library() -> None:
    environment = thread_environment(3)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"

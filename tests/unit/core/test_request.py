"""A request's states and stages."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import Internal
from baton.core.request import (
    TERMINAL,
    TRANSITIONS,
    Part,
    RequestState,
    RequestStatus,
    Stage,
    StageLog,
)

S = RequestStatus
PATHS = {
    S.NEW: [],
    S.TOKENIZED: [S.TOKENIZED],
    S.ADMITTED: [S.TOKENIZED, S.ADMITTED],
    S.RESERVED: [S.TOKENIZED, S.ADMITTED, S.RESERVED],
}
PATHS[S.PREFILLING] = [*PATHS[S.RESERVED], S.PREFILLING]
PATHS[S.TRANSFERRING] = [*PATHS[S.PREFILLING], S.TRANSFERRING]
PATHS[S.COMMITTED] = [*PATHS[S.TRANSFERRING], S.COMMITTED]
PATHS[S.DECODING] = [*PATHS[S.COMMITTED], S.DECODING]
PATHS[S.FINISHED] = [*PATHS[S.DECODING], S.FINISHED]
PATHS[S.RELEASING] = [S.RELEASING]
PATHS[S.ABORTED] = [S.RELEASING, S.ABORTED]
PATHS[S.FAILED] = [S.RELEASING, S.FAILED]


def _at(status: RequestStatus) -> RequestState:
    state = RequestState("r", 0.0)
    for step, to in enumerate(PATHS[status]):
        state.transition(to, float(step + 1))
    return state


@pytest.mark.parametrize(("start", "to"), list(product(S, S)), ids=lambda status: status.value)
def test_every_pair_of_states_is_legal_or_refused(start: S, to: S) -> None:
    state = _at(start)
    assert state.status is start
    num_stamps = len(state.stamps)
    if (start, to) in TRANSITIONS:
        state.transition(to, 99.0)
        assert state.status is to
        assert (state.stamps[-1].status, state.stamps[-1].at_s) == (to, 99.0)
    else:
        with pytest.raises(Internal, match="r: "):
            state.transition(to, 99.0)
        assert (state.status, len(state.stamps)) == (start, num_stamps)


def test_the_way_of_the_design_is_legal() -> None:
    ways = [
        [S.NEW, *PATHS[S.FINISHED]],
        [S.NEW, S.TOKENIZED, S.ADMITTED, S.RESERVED, S.DECODING, S.FINISHED],
        [S.DECODING, S.RELEASING, S.ADMITTED, S.RESERVED],
    ]
    for way in ways:
        assert set(pairwise(way)) <= TRANSITIONS


def test_nothing_follows_a_terminal_state_and_all_else_can_be_released() -> None:
    assert not {start for start, _ in TRANSITIONS} & TERMINAL
    releasable = {start for start, to in TRANSITIONS if to is S.RELEASING}
    assert releasable == set(S) - TERMINAL - {S.RELEASING}


@given(st.lists(st.sampled_from(S), max_size=40))
def test_whatever_is_tried_there_is_at_most_one_terminal_event(tries: list[S]) -> None:
    state = RequestState("r", 0.0)
    for number, to in enumerate(tries):
        try:
            state.transition(to, float(number))
        except Internal:
            continue
    ended = [stamp for stamp in state.stamps if stamp.status in TERMINAL]
    assert len(ended) <= 1
    assert state.is_over == bool(ended)
    assert state.attempt == sum(stamp.status is S.ADMITTED for stamp in state.stamps)
    if not state.is_over:
        state.end(S.ABORTED, 100.0)
    with pytest.raises(Internal):
        state.end(S.FAILED, 101.0)


@pytest.mark.parametrize("status", [s for s in S if s not in TERMINAL], ids=lambda s: s.value)
@pytest.mark.parametrize("to", sorted(TERMINAL, key=lambda s: s.value), ids=lambda s: s.value)
def test_every_live_state_can_end_every_way(status: S, to: S) -> None:
    state = _at(status)
    state.end(to, 50.0)
    assert state.status is to


def test_end_refuses_a_state_that_is_no_end() -> None:
    with pytest.raises(Internal):
        RequestState("r", 0.0).end(S.DECODING, 1.0)


_REPORTED = st.floats(-1.0, 5.0)


@given(
    st.floats(0.0, 1e6),
    st.lists(
        st.tuples(st.floats(0.0, 3.0), st.lists(_REPORTED, max_size=3), st.booleans()), max_size=8
    ),
)
def test_stages_before_the_first_token_are_gapless_and_add_up(
    start_s: float, steps: list[tuple[float, list[float], bool]]
) -> None:
    log = StageLog(start_s)
    now = start_s
    for elapsed_s, reported, is_split in steps:
        now += elapsed_s
        if is_split:
            log.split([Part("queue", value) for value in reported], "relay", now, worker_id="p")
        else:
            log.mark("step", now)
    log.first_token("detokenize", now + 0.5)
    log.mark("late", now + 9.0)
    log.split([Part("late", 1.0)], "late", now + 9.0)
    log.first_token("late", now + 9.0)
    log.add(Stage("decode", 1.0, 1.0, before_first_token=False))
    path = [stage for stage in log.stages if stage.before_first_token]
    assert "late" not in {stage.name for stage in log.stages}
    assert path[0].start_s == 0.0
    for before, after in pairwise(path):
        assert after.start_s == pytest.approx(before.start_s + before.duration_s, abs=1e-6)
    assert all(stage.duration_s >= 0.0 for stage in path)
    assert sum(stage.duration_s for stage in path) == pytest.approx(log.ttft_s, abs=1e-6)


def test_split_gives_reported_times_and_the_rest() -> None:
    log = StageLog(10.0)
    log.mark("reserve", 11.0, worker_id="d")
    log.split([Part("queue", 0.5), Part("prefill", 2.0, 7)], "relay", 14.0, worker_id="p")
    found = [(s.name, s.start_s, s.duration_s, s.worker_id, s.num_tokens) for s in log.stages]
    assert found == [
        ("reserve", 0.0, 1.0, "d", 0),
        ("queue", 1.0, 0.5, "p", 0),
        ("prefill", 1.5, 2.0, "p", 7),
        ("relay", 3.5, 0.5, "", 0),
    ]
    assert log.ttft_s is None
    assert log.since_arrival(9.0) == 0.0

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.batching import Candidate, StepItem, StepLimits, StepPlan, plan_step

LIMITS = StepLimits(
    max_num_batched_tokens=64, max_num_seqs=8, block_size=16, num_available_blocks=100
)


def _decoding(name: str, num_tokens: int, **kwargs: int | bool) -> Candidate:
    blocks = -(-(num_tokens - 1) // 16)
    return replace(
        Candidate(name, num_tokens, num_tokens - 1, blocks, num_private_blocks=blocks),
        **kwargs,
    )


def _waiting(name: str, num_tokens: int, **kwargs: int | bool) -> Candidate:
    return replace(Candidate(name, num_tokens, 0, 0), **kwargs)


def _items(plan: StepPlan) -> dict[str, StepItem]:
    return {item.seq_id: item for item in plan.items}


def test_decoding_goes_before_prompts_which_fill_the_budget() -> None:
    plan = plan_step([_decoding("a", 33)], [_waiting("b", 200)], LIMITS)
    items = _items(plan)
    assert items["a"].num_tokens == 1
    assert items["a"].num_new_blocks == 1
    assert items["a"].is_sampled
    assert items["b"].num_tokens == 63
    assert items["b"].is_admitted
    assert not items["b"].is_sampled
    assert items["b"].num_new_blocks == 13, "all of a prompt's blocks at once"


def test_the_last_chunk_is_sampled() -> None:
    plan = plan_step([Candidate("a", 100, 63, 7)], [], LIMITS)
    (item,) = plan.items
    assert (item.start, item.num_tokens, item.num_new_blocks) == (63, 37, 0)
    assert item.is_sampled


def test_every_decoding_sequence_moves_before_any_has_drafts() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=8)
    running = [_decoding(name, 20, order=i, num_draft_tokens=4) for i, name in enumerate("abcd")]
    items = _items(plan_step(running, [], limits))
    assert [items[name].num_tokens for name in "abcd"] == [5, 1, 1, 1]
    assert items["a"].num_draft_tokens == 4


def test_drafts_are_dropped_before_anybody_is_preempted() -> None:
    limits = replace(LIMITS, num_available_blocks=0)
    plan = plan_step([_decoding("a", 16, num_draft_tokens=4)], [], limits)
    (item,) = plan.items
    assert (item.num_tokens, item.num_draft_tokens) == (1, 0)
    assert plan.preempted_seq_ids == ()


def test_the_least_important_and_youngest_is_preempted() -> None:
    limits = replace(LIMITS, num_available_blocks=0)
    running = [
        _decoding("low", 17, priority=-1, order=0),
        _decoding("old", 17, order=1),
        _decoding("young", 17, order=2),
    ]
    plan = plan_step(running, [_waiting("new", 1)], limits)
    assert plan.preempted_seq_ids == ("low", "young")
    assert [item.seq_id for item in plan.items] == ["old"]


def test_preempting_takes_back_what_the_victim_was_given_in_this_step() -> None:
    limits = replace(LIMITS, num_available_blocks=1)
    running = [
        replace(_decoding("a", 17), priority=-1),
        Candidate("b", 48, 16, 1, priority=1),
    ]
    plan = plan_step(running, [], limits)
    assert plan.preempted_seq_ids == ("a",)
    assert "a" not in _items(plan)


def test_a_sequence_that_may_not_be_preempted_is_left_alone() -> None:
    limits = replace(LIMITS, num_available_blocks=0)
    running = [_decoding("a", 17), replace(_decoding("kept", 17), order=9, is_preemptible=False)]
    plan = plan_step(running, [], limits)
    assert plan.preempted_seq_ids == ("a",)


def test_a_prompt_without_room_lets_nobody_pass_who_takes_blocks() -> None:
    limits = replace(LIMITS, num_available_blocks=3)
    waiting = [
        _waiting("big", 100, order=0),
        _waiting("small", 1, order=1),
        Candidate("ready", 30, 29, 2, order=2),
    ]
    plan = plan_step([], waiting, limits)
    assert [item.seq_id for item in plan.items] == ["ready"]


def test_cached_blocks_that_are_revived_count_as_taken() -> None:
    limits = replace(LIMITS, num_available_blocks=4)
    candidate = Candidate("a", 80, 64, 4, num_revived_blocks=4)
    assert plan_step([], [candidate], limits).items == ()
    shared = replace(candidate, num_revived_blocks=3)
    assert len(plan_step([], [shared], limits).items) == 1


def test_priority_goes_before_arrival() -> None:
    limits = replace(LIMITS, max_num_seqs=1)
    waiting = [_waiting("first", 5, order=0), _waiting("urgent", 5, order=1, priority=1)]
    assert [item.seq_id for item in plan_step([], waiting, limits).items] == ["urgent"]


@st.composite
def _candidates(draw: st.DrawFn, *, is_running: bool) -> list[Candidate]:
    found = []
    for index in range(draw(st.integers(0, 6))):
        num_tokens = draw(st.integers(1, 120))
        computed = draw(st.integers(0, num_tokens - 1))
        blocks = -(-computed // 16)
        found.append(
            Candidate(
                seq_id=f"{'r' if is_running else 'w'}{index}",
                num_tokens=num_tokens,
                num_computed_tokens=computed,
                num_blocks=blocks,
                priority=draw(st.integers(-1, 1)),
                order=draw(st.integers(0, 20)),
                num_draft_tokens=draw(st.integers(0, 5)) if num_tokens - computed == 1 else 0,
                num_private_blocks=blocks if is_running else 0,
                num_revived_blocks=0 if is_running else draw(st.integers(0, blocks)),
                is_preemptible=draw(st.booleans()),
            )
        )
    return found


@settings(max_examples=300, deadline=None)
@given(
    running=_candidates(is_running=True),
    waiting=_candidates(is_running=False),
    budget=st.integers(1, 80),
    available=st.integers(0, 20),
)
def test_a_plan_never_exceeds_its_limits(
    running: list[Candidate], waiting: list[Candidate], budget: int, available: int
) -> None:
    limits = StepLimits(budget, 8, 16, available)
    plan = plan_step(running, waiting, limits)
    by_id = {candidate.seq_id: candidate for candidate in [*running, *waiting]}
    assert sum(item.num_tokens for item in plan.items) <= budget
    freed = sum(by_id[seq_id].num_private_blocks for seq_id in plan.preempted_seq_ids)
    taken = sum(item.num_new_blocks for item in plan.items)
    revived = sum(by_id[item.seq_id].num_revived_blocks for item in plan.items if item.is_admitted)
    assert taken + revived <= available + freed
    assert len({item.seq_id for item in plan.items}) == len(plan.items)
    assert not set(plan.preempted_seq_ids) & {item.seq_id for item in plan.items}
    for item in plan.items:
        candidate = by_id[item.seq_id]
        assert item.num_tokens >= 1
        assert item.start == candidate.num_computed_tokens
        end = item.start + item.num_tokens
        assert end <= 16 * (candidate.num_blocks + item.num_new_blocks)
        assert item.num_draft_tokens <= candidate.num_draft_tokens
        assert end - item.num_draft_tokens <= candidate.num_tokens
        assert item.is_sampled == (end >= candidate.num_tokens)
    kept = len(running) - len(plan.preempted_seq_ids)
    admitted = sum(item.is_admitted for item in plan.items)
    assert kept + admitted <= max(8, kept)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_everything_that_fits_alone_is_computed_in_the_end(lengths: list[int]) -> None:
    """A small pool, prompts that decode 20 tokens each: all of them end."""
    pool = 14
    state = {f"s{i}": [n, 0, 0] for i, n in enumerate(lengths)}
    goal = {f"s{i}": n + 20 for i, n in enumerate(lengths)}
    running: list[str] = []
    for _ in range(2000):
        if not state:
            return
        used = sum(blocks for _, _, blocks in state.values())
        limits = StepLimits(48, 4, 16, pool - used)

        def view(name: str) -> Candidate:
            tokens, computed, blocks = state[name]
            return Candidate(
                name, tokens, computed, blocks, order=int(name[1:]), num_private_blocks=blocks
            )

        plan = plan_step(
            [view(name) for name in running],
            [view(name) for name in state if name not in running],
            limits,
        )
        for name in plan.preempted_seq_ids:
            running.remove(name)
            state[name][1:] = [0, 0]
        for item in plan.items:
            if item.is_admitted:
                running.append(item.seq_id)
            entry = state[item.seq_id]
            entry[1] += item.num_tokens
            entry[2] += item.num_new_blocks
            entry[0] += item.is_sampled
            if entry[0] >= goal[item.seq_id]:
                del state[item.seq_id]
                running.remove(item.seq_id)
    raise AssertionError(f"no end: {state}")

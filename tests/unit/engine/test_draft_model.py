from __future__ import annotations

from baton.core.sampling import SamplingParams
from baton.core.sequence import Sequence, SequenceSpec, SequenceStatus
from baton.engine.drafts import count_accepted, sample_row
from baton.engine.sampler import Sampled


def test_drafts_are_accepted_up_to_the_first_that_differs() -> None:
    sampled = [Sampled(token) for token in (1, 2, 3, 4)]
    assert count_accepted([1, 2, 3], sampled) == 3
    assert count_accepted([1, 9, 3], sampled) == 1
    assert count_accepted([9, 2, 3], sampled) == 0
    assert count_accepted([], sampled) == 0


def _sequence(sampling: SamplingParams) -> Sequence:
    spec = SequenceSpec("a", (5, 6, 7), sampling, 10, num_output_tokens=1)
    return Sequence(spec, 1, 0.0, SequenceStatus.RUNNING)


def test_the_position_counts_output_of_earlier_attempts_and_drafts() -> None:
    row = sample_row(_sequence(SamplingParams(seed=3)), [8, 9], frozenset())
    assert (row.seed, row.position) == (3, 3)


def test_penalties_see_drafts_as_output() -> None:
    row = sample_row(_sequence(SamplingParams(seed=3, presence_penalty=1.0)), [8], frozenset())
    assert list(row.prompt_token_ids) == [5, 6]
    assert list(row.output_token_ids) == [7, 8]


def test_a_prompt_is_gone_through_for_penalties_only_once() -> None:
    spec = SequenceSpec("a", (7, 5, 7, 6, 5), SamplingParams(repetition_penalty=1.3), 10)
    sequence = Sequence(spec, 1, 0.0, SequenceStatus.RUNNING)
    first, second = (sample_row(sequence, drafts, frozenset()) for drafts in ([], [8]))
    assert first.prompt_token_ids == (7, 5, 6)
    assert second.prompt_token_ids is first.prompt_token_ids

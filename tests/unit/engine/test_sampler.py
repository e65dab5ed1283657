from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from baton.core.sampling import SamplingParams
from baton.engine.sampler import Sampler, SampleRow

VOCAB_SIZE = 12
EOS = 2


def _row(sampling: SamplingParams, **changes: object) -> SampleRow:
    row = SampleRow(
        sampling=sampling,
        seed=1,
        position=0,
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=frozenset({EOS}),
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def _greedy(**changes: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, **changes)  # type: ignore[arg-type]


def _logits(num_rows: int = 1, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 1.5


def _counts(
    logits: torch.Tensor, sampling: SamplingParams, num: int = 20_000, **changes: object
) -> list[int]:
    sampler = Sampler(logits.shape[-1], "cpu")
    rows = [_row(sampling, position=index, **changes) for index in range(num)]
    counts = [0] * logits.shape[-1]
    for sampled in sampler.sample(logits.expand(num, -1), rows):
        counts[sampled.token_id] += 1
    return counts


def _assert_fits(counts: list[int], expected: torch.Tensor) -> None:
    """Chi-square of the tokens that can occur, and none of the others."""
    num = sum(counts)
    chi_square, degrees = 0.0, -1
    for count, probability in zip(counts, expected.tolist(), strict=True):
        if probability == 0.0:
            assert count == 0
            continue
        chi_square += (count - num * probability) ** 2 / (num * probability)
        degrees += 1
    # Wilson-Hilferty: the 1e-5 point of chi-square.
    z = 4.27
    limit = degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < limit


def test_plain_sampling_fits_the_softmax() -> None:
    logits = _logits()
    for temperature in (0.5, 1.0, 2.0):
        counts = _counts(logits, SamplingParams(temperature=temperature))
        _assert_fits(counts, torch.softmax(logits[0] / temperature, dim=-1))


def test_top_k_top_p_and_min_p_fit_the_cut_distribution() -> None:
    logits = _logits(seed=3)
    scaled = logits[0] / 0.8
    order = scaled.argsort(descending=True)

    kept = torch.full_like(scaled, -math.inf)
    kept[order[:4]] = scaled[order[:4]]
    _assert_fits(
        _counts(logits, SamplingParams(temperature=0.8, top_k=4)), torch.softmax(kept, dim=-1)
    )

    # The smallest set whose mass, renormalised after top-k, reaches top_p.
    mass = torch.softmax(kept, dim=-1)[order].cumsum(0)
    num = int((mass < 0.9).sum()) + 1
    both = torch.full_like(scaled, -math.inf)
    both[order[:num]] = scaled[order[:num]]
    _assert_fits(
        _counts(logits, SamplingParams(temperature=0.8, top_k=4, top_p=0.9)),
        torch.softmax(both, dim=-1),
    )

    probabilities = torch.softmax(scaled, dim=-1)
    floor = torch.where(probabilities >= 0.2 * probabilities.max(), scaled, torch.tensor(-math.inf))
    for sampling in (
        SamplingParams(temperature=0.8, min_p=0.2),
        SamplingParams(temperature=0.8, min_p=0.2, top_p=0.9999999),
    ):
        _assert_fits(_counts(logits, sampling), torch.softmax(floor, dim=-1))


@pytest.mark.parametrize(
    "sampling", [SamplingParams(top_p=0.97), SamplingParams(top_k=1500), SamplingParams(top_k=2000)]
)
def test_cuts_wider_than_the_candidates_are_exact(sampling: SamplingParams) -> None:
    vocab_size = 2000
    logits = _logits(seed=5, vocab_size=vocab_size) * 0.01
    order = logits[0].argsort(descending=True)
    num = sampling.top_k or int(
        (torch.softmax(logits[0].double(), dim=-1)[order].cumsum(0) < sampling.top_p).sum() + 1
    )
    counts = torch.tensor(_counts(logits, sampling, num=4000))
    assert counts[order[num:]].sum() == 0
    assert counts[order[1024:num]].sum() > 4000 * (num - 1024) / num * 0.8


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    logits = torch.zeros(4, 4)
    sampler = Sampler(4, "cpu")
    pairs = [0] * 16
    for start in range(0, 8000, 4):
        rows = [_row(SamplingParams(), seed=9, position=start + step) for step in range(4)]
        tokens = [sampled.token_id for sampled in sampler.sample(logits, rows)]
        pairs[tokens[0] * 4 + tokens[1]] += 1
        pairs[tokens[2] * 4 + tokens[3]] += 1
    _assert_fits(pairs, torch.full((16,), 1 / 16))


MIXED = [
    SamplingParams(),
    _greedy(),
    SamplingParams(temperature=0.7, top_k=3),
    SamplingParams(temperature=1.3, top_p=0.8, logprobs=True, top_logprobs=3),
    SamplingParams(min_p=0.1, repetition_penalty=1.2),
    _greedy(logit_bias={4: 3.0}, presence_penalty=1.0),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.5, top_k=5, min_p=0.05, frequency_penalty=0.5, min_tokens=99),
]


def test_a_rows_token_does_not_depend_on_its_neighbours() -> None:
    logits = _logits(num_rows=len(MIXED) * 8, seed=11)
    rows = [
        _row(
            MIXED[index % len(MIXED)],
            seed=index * 7,
            position=index,
            prompt_token_ids=(1, 5, 5),
            output_token_ids=(3, 3, 7),
        )
        for index in range(len(logits))
    ]
    sampler = Sampler(VOCAB_SIZE, "cpu")
    together = sampler.sample(logits, rows)
    alone = [sampler.sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    assert together == alone
    assert len({sampled.token_id for sampled in together}) > 4
    assert sampler.sample(logits.flip(0), rows[::-1]) == together[::-1]


def test_ties_go_to_the_lower_id() -> None:
    sampler = Sampler(VOCAB_SIZE, "cpu")
    logits = torch.tensor([[0.0, -0.0, 5.0, 1.0, 5.0, 5.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    for sampling in (_greedy(), SamplingParams(top_k=1), SamplingParams(top_p=0.01)):
        assert sampler.sample(logits, [_row(sampling)])[0].token_id == 2
    counts = _counts(logits, SamplingParams(top_k=3), num=600)
    assert [index for index, count in enumerate(counts) if count] == [2, 4, 5]
    top = _row(_greedy(logprobs=True, top_logprobs=6))
    logprob = sampler.sample(logits, [top])[0].logprob
    assert logprob is not None
    assert logprob.top_token_ids == (2, 4, 5, 7, 3, 0)


def test_penalties_follow_their_definitions() -> None:
    sampler = Sampler(4, "cpu")

    def best(logits: list[float], sampling: SamplingParams, **changes: object) -> int:
        return sampler.sample(torch.tensor([logits]), [_row(sampling, **changes)])[0].token_id

    # Repetition divides what is positive and multiplies what is negative, in prompt and output.
    repeat = _greedy(repetition_penalty=2.0)
    assert best([4.0, 2.1, 0.0, 0.0], repeat, prompt_token_ids=(0, 0)) == 1
    assert best([4.0, 1.9, 0.0, 0.0], repeat, output_token_ids=(0, 0)) == 0
    assert best([-1.0, -1.5, -9.0, -9.0], repeat, prompt_token_ids=(0,)) == 1
    # Presence subtracts once, frequency per occurrence, both of the output only.
    assert best([2.0, 1.1, 0.0, 0.0], _greedy(presence_penalty=1.0), output_token_ids=(0, 0)) == 1
    assert best([2.0, 0.9, 0.0, 0.0], _greedy(presence_penalty=1.0), output_token_ids=(0, 0)) == 0
    assert best([2.0, 1.1, 0.0, 0.0], _greedy(presence_penalty=1.0), prompt_token_ids=(0,)) == 0
    assert best([2.0, 0.9, 0.0, 0.0], _greedy(frequency_penalty=0.6), output_token_ids=(0, 0)) == 1
    assert best([2.0, 0.7, 0.0, 0.0], _greedy(frequency_penalty=0.6), output_token_ids=(0, 0)) == 0
    assert best([2.0, 0.7, 0.0, 0.0], _greedy(logit_bias={1: 1.4, 77: 9.0})) == 1


def test_no_end_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS], logits[0, 5], logits[0, 1] = 9.0, 8.0, 1.0
    sampler = Sampler(VOCAB_SIZE, "cpu")
    sampling = _greedy(min_tokens=2, stop_token_ids=(5, 900))
    chosen = [
        sampler.sample(logits, [_row(sampling, position=position)])[0].token_id
        for position in range(3)
    ]
    assert chosen == [1, 1, EOS]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = _logits(num_rows=2, seed=4)
    sampling = SamplingParams(
        temperature=0.3, top_k=2, logit_bias={1: -5.0}, logprobs=True, top_logprobs=5
    )
    before = logits.clone()
    plain, told = Sampler(VOCAB_SIZE, "cpu").sample(logits, [_row(_greedy()), _row(sampling)])
    assert plain.logprob is None
    assert told.logprob is not None
    expected = torch.log_softmax(logits[1], dim=-1)
    assert told.logprob.logprob == pytest.approx(expected[told.token_id].item(), abs=1e-5)
    best = expected.topk(5)
    assert list(told.logprob.top_token_ids) == best.indices.tolist()
    assert list(told.logprob.top_logprobs) == pytest.approx(best.values.tolist(), abs=1e-5)
    assert torch.equal(logits, before)


def test_a_plain_greedy_batch_costs_one_argmax() -> None:
    logits = _logits(num_rows=3)
    sampler = Sampler(VOCAB_SIZE, "cpu")
    with (
        mock.patch("baton.engine.sampler.gumbel") as noise,
        mock.patch.object(torch.Tensor, "clone") as clone,
    ):
        sampled = sampler.sample(logits, [_row(_greedy())] * 3)
    assert [item.token_id for item in sampled] == logits.argmax(dim=-1).tolist()
    noise.assert_not_called()
    clone.assert_not_called()
    assert sampler.sample(logits[:0], []) == []


def test_extreme_settings_stay_finite() -> None:
    sampler = Sampler(VOCAB_SIZE, "cpu")
    logits = _logits() * 1e4
    best = int(logits.argmax())
    for sampling in (
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=1e-3, top_p=1e-9),
    ):
        assert sampler.sample(logits, [_row(sampling)])[0].token_id == best
    assert 0 <= sampler.sample(logits, [_row(SamplingParams(temperature=100.0))])[0].token_id < 12


def _mask(*allowed: int, vocab_size: int = VOCAB_SIZE) -> bytes:
    mask = bytearray(-(-vocab_size // 32) * 4)
    for token_id in allowed:
        mask[token_id // 8] |= 1 << token_id % 8
    return bytes(mask)


@pytest.mark.parametrize(
    "sampling",
    [
        _greedy(),
        SamplingParams(),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.1, min_p=0.5),
        _greedy(logit_bias={0: 1000.0}, repetition_penalty=5.0),
    ],
)
def test_only_what_a_mask_allows_is_chosen(sampling: SamplingParams) -> None:
    logits = _logits()
    order = logits[0].argsort().tolist()
    allowed = {order[0], order[3]}
    sampler = Sampler(VOCAB_SIZE, "cpu")
    rows = [_row(sampling, mask=_mask(*allowed), position=index) for index in range(50)]
    chosen = {one.token_id for one in sampler.sample(logits.expand(50, -1), rows)}
    assert order[3] in chosen
    assert chosen <= allowed


def test_a_mask_concerns_its_own_row_only() -> None:
    logits = _logits(3)
    best = logits.argmax(dim=-1).tolist()
    rows = [_row(_greedy()), _row(_greedy(), mask=_mask(5)), _row(_greedy())]
    before = logits.clone()
    chosen = [one.token_id for one in Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)]
    assert chosen == [best[0], 5, best[2]]
    assert torch.equal(logits, before)


def test_a_mask_of_any_width_fits_the_vocabulary() -> None:
    for vocab_size in (1, 7, 8, 31, 32, 33, 100):
        last = vocab_size - 1
        row = _row(_greedy(), mask=_mask(last, vocab_size=vocab_size))
        logits = _logits(vocab_size=vocab_size)
        assert Sampler(vocab_size, "cpu").sample(logits, [row])[0].token_id == last


def test_a_mask_samples_in_proportion_to_what_is_left() -> None:
    logits = _logits()
    allowed = [1, 4, 7, 8]
    expected = torch.full_like(logits[0], -math.inf)
    expected[allowed] = logits[0, allowed]
    counts = _counts(logits, SamplingParams(), mask=_mask(*allowed))
    _assert_fits(counts, expected.softmax(dim=-1))


def test_the_end_is_held_back_unless_the_mask_leaves_nothing_else() -> None:
    sampling = _greedy(min_tokens=3)
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, EOS] = 5.0
    rows = [_row(sampling, mask=_mask(EOS, 7)), _row(sampling, mask=_mask(EOS))]
    chosen = [one.token_id for one in Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)]
    assert chosen == [7, EOS]


def test_rows_edited_together_are_edited_as_if_alone() -> None:
    logits = _logits(6, seed=3)
    rows = [
        _row(_greedy(repetition_penalty=1.7), prompt_token_ids=(1, 2, 2), output_token_ids=(3,)),
        _row(_greedy()),
        _row(_greedy(frequency_penalty=1.5, presence_penalty=-0.5), output_token_ids=(4, 4, 9)),
        _row(_greedy(logit_bias={4: 2.0, 999: 9.0}, min_tokens=2), output_token_ids=(4,)),
        _row(
            _greedy(
                logit_bias={4: 2.0, 9: -1.0},
                frequency_penalty=0.7,
                repetition_penalty=0.8,
                min_tokens=5,
            ),
            prompt_token_ids=(0, 9),
            output_token_ids=(4, 9, 4),
            mask=_mask(*range(0, VOCAB_SIZE, 2)),
        ),
        _row(_greedy(min_tokens=1, stop_token_ids=(0, 3))),
    ]
    sampler = Sampler(VOCAB_SIZE, "cpu")
    together = sampler._edited(logits, rows)
    for index, row in enumerate(rows):
        alone = sampler._edited(logits[index : index + 1], [row])[0]
        assert torch.equal(together[index], alone)
    assert torch.equal(together[1], logits[1])
    third = logits[2].clone()
    third[4] -= -0.5 + 2 * 1.5
    third[9] -= -0.5 + 1.5
    torch.testing.assert_close(together[2], third)


@pytest.mark.parametrize("vocab_size", [100, 4096, 4100, 6400])
def test_the_largest_logit_wins_and_the_lowest_id_among_equals(vocab_size: int) -> None:
    sampler = Sampler(vocab_size, "cpu")
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(4)).round()
    logits[3] = 0.0
    logits[4, :-1] = -torch.inf
    rows = [SampleRow(SamplingParams(temperature=0.0), 0, 0, (), (), ())] * 5
    chosen = [sampled.token_id for sampled in sampler.sample(logits, rows)]
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert chosen == expected

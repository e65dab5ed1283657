from __future__ import annotations

import math

import pytest
import torch

from baton.core.sampling import SamplingParams
from baton.engine.cutoff import kept_tokens
from baton.engine.sampler import Sampler, SampleRow

VOCAB_SIZE = 20_000


def _sorted_cut(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The definition: sort the whole vocabulary, the lower id first among equals."""
    order = logits.sort(descending=True, stable=True).indices
    order = order[logits[order].isfinite()][: sampling.top_k or None]
    scaled = (logits[order] - logits[order][0]) / sampling.temperature
    mass = scaled.double().exp()
    before = mass.cumsum(0) - mass
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[order[before < sampling.top_p * mass.sum()] if sampling.top_p < 1.0 else order] = True
    return kept


def _cases() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(VOCAB_SIZE, generator=generator)
    forbidden = noise.clone()
    forbidden[::3] = -math.inf
    outliers = noise.clone()
    outliers[5], outliers[6] = 3e38, -3e38
    return {
        "random": noise,
        "peaked": noise * 8,
        "sixteen bits": noise.bfloat16().float(),
        "all equal": torch.zeros(VOCAB_SIZE),
        "both zeros": torch.zeros(VOCAB_SIZE) * torch.tensor([1.0, -1.0]).repeat(VOCAB_SIZE // 2),
        "masked": forbidden,
        "outliers": outliers,
        "close together": 1.0 + noise * 1e-6,
    }


@pytest.mark.parametrize("name", _cases())
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=100.0, top_p=0.5),
        SamplingParams(temperature=0.7, top_k=5000),
        SamplingParams(temperature=2.0, top_k=9000, top_p=0.7),
        SamplingParams(temperature=1.0, top_p=0.999999),
    ],
)
def test_what_is_kept_is_what_a_sort_would_keep(name: str, sampling: SamplingParams) -> None:
    logits = _cases()[name]
    scaled = (logits - logits.max()) / sampling.temperature
    kept, expected = kept_tokens(logits, scaled, sampling), _sorted_cut(logits, sampling)
    # Their sums are rounded differently: at the very edge one token may be in or out.
    assert (kept != expected).sum() <= (1 if sampling.top_p < 1.0 else 0)
    assert kept.any()


def test_nan_ends_the_search() -> None:
    logits = torch.full((VOCAB_SIZE,), math.nan)
    logits[7:5000] = 1.0
    kept_tokens(logits, logits, SamplingParams(top_p=0.9))
    kept_tokens(logits, logits, SamplingParams(top_k=3000))


def test_a_flat_distribution_is_never_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    topk, sort = torch.Tensor.topk, torch.Tensor.sort

    def counting_topk(self: torch.Tensor, k: int, **kwargs: int) -> object:
        widths.append(k)
        return topk(self, k, **kwargs)

    def counting_sort(self: torch.Tensor, **kwargs: bool) -> object:
        widths.append(self.shape[-1])
        return sort(self, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", counting_topk)
    monkeypatch.setattr(torch.Tensor, "sort", counting_sort)
    logits = _cases()["random"].unsqueeze(0)
    sampling = SamplingParams(temperature=100.0, top_p=0.99)
    row = SampleRow(sampling, 1, 0, (), (), frozenset())
    (sampled,) = Sampler(VOCAB_SIZE, "cpu").sample(logits, [row])
    assert 0 <= sampled.token_id < VOCAB_SIZE
    assert max(widths) <= 1024

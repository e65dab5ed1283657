from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from baton.engine.noise import gumbel

_EULER_GAMMA = 0.5772156649015329


def _ids(vocab_size: int) -> torch.Tensor:
    return torch.arange(vocab_size, dtype=torch.int32).unsqueeze(0)


def _uniform(noise: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.exp(-noise.double()))


def test_noise_of_a_token_does_not_depend_on_the_shape_of_the_batch() -> None:
    whole = gumbel([7, 8, 9], [0, 5, 1000], _ids(50_021))
    for row, (seed, position) in enumerate([(7, 0), (8, 5), (9, 1000)]):
        assert torch.equal(gumbel([seed], [position], _ids(50_021))[0], whole[row])
    picked = torch.tensor([[3, 50_020, 17], [4, 0, 49_999], [1, 2, 3]], dtype=torch.int32)
    assert torch.equal(gumbel([7, 8, 9], [0, 5, 1000], picked), whole.gather(1, picked.long()))


def test_noise_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from baton.engine.noise import gumbel; torch.set_num_threads(1);"
        "ids = torch.arange(1000, dtype=torch.int32).unsqueeze(0);"
        "print(gumbel([(1 << 64) - 1], [3], ids).numpy().tobytes().hex()[:4000])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50
    )
    mine = gumbel([(1 << 64) - 1], [3], _ids(1000)).numpy().tobytes().hex()[:4000]
    assert told.stdout.strip() == mine


def test_values_are_pinned() -> None:
    """A change here changes the text of every seeded request during a rolling upgrade."""
    noise = gumbel([1234], [0], _ids(4))[0].tolist()
    assert noise == pytest.approx([-0.891783, 0.993181, 1.351396, 0.222512], rel=1e-5)


def test_every_part_of_the_key_counts() -> None:
    base = gumbel([1], [1], _ids(64))
    for seed, position in [(2, 1), (1, 2), (1 + (1 << 32), 1), (1 + (1 << 63), 1), (0, 0)]:
        assert not torch.isclose(gumbel([seed], [position], _ids(64)), base).any()


def test_distribution_is_gumbel() -> None:
    noise = gumbel(list(range(64)), [0] * 64, _ids(4096)).double().flatten()
    num = noise.numel()
    assert noise.isfinite().all()
    sigma = math.pi / math.sqrt(6)
    assert noise.mean().item() == pytest.approx(_EULER_GAMMA, abs=5 * sigma / math.sqrt(num))
    assert noise.std().item() == pytest.approx(sigma, rel=0.01)
    # Kolmogorov-Smirnov against uniform: 1.95 / sqrt(n) is the 0.1 % point.
    uniform = _uniform(noise).sort().values
    steps = torch.arange(1, num + 1, dtype=torch.float64) / num
    assert (uniform - steps).abs().max().item() < 1.95 / math.sqrt(num)


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_neighbours_are_uncorrelated(axis: str) -> None:
    positions = list(range(512))
    if axis == "seed":
        first = gumbel([5] * 512, positions, _ids(512))
        second = gumbel([6] * 512, positions, _ids(512))
    else:
        rows = gumbel([5] * 513, list(range(513)), _ids(513))
        first = rows[:512, :512]
        second = rows[1:, :512] if axis == "position" else rows[:512, 1:]
    stacked = torch.stack([_uniform(first).flatten(), _uniform(second).flatten()])
    assert abs(torch.corrcoef(stacked)[0, 1].item()) < 5 / math.sqrt(512 * 512)


def test_no_row_is_a_shifted_copy_of_another() -> None:
    rows = gumbel([5] * 64, list(range(64)), _ids(4096))
    values = rows.view(torch.int32).flatten().tolist()
    # 2^18 draws of 2^31 values collide about 16 times by chance (more after rounding to float32);
    # overlapping rows would share hundreds.
    windows = {tuple(values[start : start + 2]) for start in range(len(values))}
    assert len(windows) >= len(values) - 2

"""Gumbel noise as a pure function of (seed, position, token id).

There is no generator and no state: the noise of a token at a position is the same on every worker,
in every batch and for draft and target alike. A hand-off, a fail-over and speculation therefore
change nothing about which tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


def _signed(word: int) -> int:
    """A 32-bit pattern as the int32 that torch wants."""
    return word - (1 << 32) if word >> 31 else word


_WEYL = _signed(0x9E3779B1)
_MULTIPLIERS = tuple(_signed(word) for word in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))


def _splitmix(state: int) -> int:
    """One output of splitmix64. Source: Steele, Lea, Flood, OOPSLA 2014."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit words; hashing twice keeps (seed, position + 1) and (seed + 1, position) apart."""
    word = _splitmix(_splitmix(seed & _MASK64) ^ position)
    return _signed(word & _MASK32), _signed(word >> 32)


def _shifted(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Logical right shift of int32: torch's own is arithmetic."""
    return (bits >> places).bitwise_and_((1 << (32 - places)) - 1)


def _hash(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """32 well-mixed bits per element. Source: triple32, C. Wellons, github skeeto/hash-prospector.

    The second key word enters between the rounds: one word alone would make the noise of two
    positions shifted copies of each other.
    """
    bits = token_ids * _WEYL + keys[:, :1]
    bits ^= _shifted(bits, 17)
    bits *= _MULTIPLIERS[0]
    bits ^= _shifted(bits, 11)
    bits ^= keys[:, 1:]
    bits *= _MULTIPLIERS[1]
    bits ^= _shifted(bits, 15)
    bits *= _MULTIPLIERS[2]
    bits ^= _shifted(bits, 14)
    return bits


def gumbel(seeds: Sequence[int], positions: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [N, K], on the device of `token_ids`.

    Args:
        seeds: one per row; their low 64 bits count.
        positions: per row, the index among the request's output tokens.
        token_ids: int32, [N, K], or [1, K] for the same ids in every row.
    """
    pairs = [_key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    keys = torch.tensor(pairs, dtype=torch.int32, device=token_ids.device).view(-1, 2)
    bits = _hash(keys, token_ids).bitwise_and_(0x7FFFFFFF)
    # The winner of the race has a small exponential: small uniforms keep all their bits in float32,
    # which is why the exponential is -log(1 - u), and u stays below 1 after rounding.
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()

"""Vectors of prompts: how hidden states become one, and how it is cut and scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from baton.core.errors import InvalidRequest

MAX_INPUTS = 2048
"""Inputs of one request. Source: OpenAI's limit."""


class Pooling(Enum):
    """How the final hidden states of a prompt's tokens become one vector. Mirrors the contract."""

    LAST = 1
    """That of the last token, which has seen all others."""
    MEAN = 2


def pooling_of(number: int) -> Pooling:
    """The pooling of the contract's number; 0 is the default.

    Raises:
        InvalidRequest: there is none.
    """
    try:
        return Pooling(number or 1)
    except ValueError as error:
        raise InvalidRequest(f"pooling must be 0 to 2, got {number}") from error


def shaped(
    vector: Sequence[float], dimensions: int = 0, *, is_scaled: bool = True
) -> tuple[float, ...]:
    """The leading values of a vector (0: all), scaled to length 1; a vector of zeros stays one.

    Raises:
        InvalidRequest: it has fewer values.
    """
    if dimensions > len(vector):
        raise InvalidRequest(
            f"dimensions must be at most {len(vector)}, the size of this model's vectors; "
            f"got {dimensions}"
        )
    kept = tuple(vector[:dimensions] if dimensions else vector)
    length = math.hypot(*kept) if is_scaled else 1.0
    return tuple(value / length for value in kept) if length else kept

"""What a cache service keeps."""

from __future__ import annotations

from dataclasses import dataclass

from baton.cache.answers import AnswerStore
from baton.cache.pins import Pins
from baton.cache.tiers import TieredStore


@dataclass(frozen=True, slots=True)
class Stores:
    """Blocks, answers and pins of one replica."""

    blocks: TieredStore
    answers: AnswerStore
    pins: Pins

"""What a cache service keeps."""

from __future__ import annotations

from dataclasses import dataclass

from baton.cache.answers import AnswerStore
from baton.cache.pins import Pins
from baton.cache.tiers import TieredStore
from baton.core.prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True)
class Stores:
    """Blocks, answers, pins and index of one replica."""

    blocks: TieredStore
    answers: AnswerStore
    pins: Pins
    index: PrefixIndex
    """What the workers hold."""

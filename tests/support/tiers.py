"""Which parameters of a test run in `make test`, and which in `make test-long` alone."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def representatives(values: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """The values as parameters; all but `kept` are marked long."""
    return [
        value if value in kept else pytest.param(value, marks=pytest.mark.long) for value in values
    ]

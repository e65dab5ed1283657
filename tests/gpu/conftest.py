"""Tests that need a CUDA device: `make test-gpu`. Without one they are skipped, all alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.conftest import TinyModel, tiny_model

__all__ = ["TinyModel", "tiny_model"]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_device = torch.cuda.is_available()
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not has_device:
                item.add_marker(pytest.mark.skip("no CUDA device on this machine"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())

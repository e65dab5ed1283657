from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.support.tiny_models import make_tiny_model

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Makes each model once per session."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            directory = tmp_path_factory.mktemp(f"{kind}-{seed}")
            made[kind, seed] = make_tiny_model(kind, directory, seed=seed)
        return made[kind, seed]

    return make

"""fp8 on devices that have it: what it costs in quality on held-out text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from baton.engine.quantize import Quantization
from baton.engine.quantize_model import WeightSource, load_weights
from benchmarks.quantization.perplexity import DEMO, heldout_texts, make_windows, perplexity

MAX_CHANGE = 0.02


def test_fp8_hardly_changes_the_perplexity(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    texts = heldout_texts(4)
    if not texts or not (DEMO / "config.json").is_file():
        pytest.skip("the demo model or its held-out text is not here")
    windows = [window.to(device) for window in make_windows(DEMO, texts)]

    def measured(quantization: Quantization | None) -> float:
        config = AutoConfig.from_pretrained(DEMO, local_files_only=True)
        source = WeightSource(DEMO, config, "sdpa", device)
        module = load_weights(source, torch.bfloat16, quantization, lambda _done, _text: None)
        return perplexity(module, windows)

    plain = measured(None)
    assert measured(Quantization("fp8")) == pytest.approx(plain, rel=MAX_CHANGE)

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from baton.engine.norms import FastRmsNorm, speed_up_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norms_are_replaced_and_compute_the_same(dtype: torch.dtype, kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    norm = kind(48, eps=1e-5)
    norm.weight.data.normal_()
    model = nn.Sequential(norm).to(dtype)
    inputs = torch.randn(1, 7, 48).to(dtype)
    before = inputs.clone()
    with torch.inference_mode():
        expected = model(inputs)
        assert speed_up_norms(model, dtype) == 1
        assert isinstance(model[0], FastRmsNorm)
        torch.testing.assert_close(model(inputs), expected)
        torch.testing.assert_close(model(inputs[:, :0]), expected[:, :0])
    assert torch.equal(inputs, before), "the input belongs to the residual stream"


def test_norms_that_compute_something_else_are_left_alone() -> None:
    model = nn.Sequential(Gemma2RMSNorm(48), nn.LayerNorm(48))
    with torch.inference_mode():
        model[0].weight.normal_()
    assert speed_up_norms(model, torch.float32) == 0
    assert isinstance(model[0], Gemma2RMSNorm)

"""Experts as linear layers compute what transformers' own experts do."""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from baton.engine.experts import ExpertLinears, open_experts
from baton.engine.linears import PackedLinear, can_prepack, packer, replace_linears
from baton.engine.quantize import Quantization, quantize_weight
from baton.engine.quantize_linears import make_linear

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 64, 96, 6, 3
EXPERTS = {
    "mixtral": MixtralExperts,
    "qwen2_moe": Qwen2MoeExperts,
    "deepseek_v3": DeepseekV3Experts,
    "gpt_oss": GptOssExperts,
}
needs_packing = pytest.mark.skipif(
    not can_prepack(torch.device("cpu"), torch.float32), reason="no packed linears here"
)


def _config(kind: str = "mixtral") -> PreTrainedConfig:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    config = AutoConfig.for_model(
        kind,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        **dict.fromkeys(names, NUM_EXPERTS),
    )
    # transformers' loop.
    config._experts_implementation = "eager"
    return config


def _drawn(experts: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def _routed(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(num_tokens)
    chosen = [torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num_tokens)]
    index = torch.stack(chosen) if chosen else torch.empty(0, TOP_K, dtype=torch.long)
    return torch.randn(num_tokens, HIDDEN).to(dtype), index, torch.rand(num_tokens, TOP_K).to(dtype)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXPERTS)
def test_they_compute_the_same_plain_and_packed(kind: str, dtype: torch.dtype) -> None:
    if not can_prepack(torch.device("cpu"), dtype):
        pytest.skip("no packed linears of this dtype")
    plain = _drawn(EXPERTS[kind](_config(kind)), dtype)
    module = nn.Sequential(copy.deepcopy(plain))
    assert open_experts(module) == 1
    limits = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.5, "rtol": 3e-2}
    with torch.inference_mode():
        for num_packed in (0, 2 * NUM_EXPERTS):
            if num_packed:
                assert replace_linears(module, packer(8)) == num_packed
            for num_tokens in (0, 1, 2, 33):
                inputs = _routed(num_tokens, dtype)
                torch.testing.assert_close(module[0](*inputs), plain(*inputs), **limits)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize(
    ("scheme", "error"), [("int8", 0.02), ("int8-dynamic", 0.03), ("int4", 0.2)]
)
def test_they_can_be_quantized(kind: str, scheme: str, error: float) -> None:
    plain = _drawn(EXPERTS[kind](_config(kind)))
    module = nn.Sequential(copy.deepcopy(plain))
    open_experts(module)

    def quantized(layer: nn.Linear) -> nn.Module:
        tensors = quantize_weight(layer.weight, Quantization(scheme, group_size=32))
        return make_linear(scheme, tensors, layer.bias, layer.weight.dtype)

    assert replace_linears(module, quantized) == 2 * NUM_EXPERTS
    with torch.inference_mode():
        for num_tokens in (1, 33):
            inputs = _routed(num_tokens)
            expected = plain(*inputs)
            difference = (module[0](*inputs) - expected).norm() / expected.norm()
            assert 0 < difference < error


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_only_experts_that_were_chosen_compute(num_tokens: int) -> None:
    module = nn.Sequential(_drawn(MixtralExperts(_config())))
    open_experts(module)
    calls: list[str] = []
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear:
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    inputs, index, weights = _routed(num_tokens)
    index[:] = torch.tensor([4, 1, 2])
    module[0](inputs, index, weights)
    chosen = {
        f"0.{part}.{expert}" for part in ("gate_up_proj", "down_proj") for expert in (1, 2, 4)
    }
    assert sorted(calls) == sorted(chosen)


@use_experts_implementation(has_gate=False, is_transposed=True)
class Ungated(nn.Module):
    """Without gates, the weights the other way round; `factor` is what the interface omits."""

    factor = 1.0

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_experts = NUM_EXPERTS
        self.up_proj = nn.Parameter(torch.empty(NUM_EXPERTS, HIDDEN, INNER))
        self.down_proj = nn.Parameter(torch.empty(NUM_EXPERTS, INNER, HIDDEN))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(chosen.tolist(), weights, strict=True):
                inner = self.act_fn(hidden_states[token] @ self.up_proj[expert])
                output[token] += weight * (inner @ self.down_proj[expert]) * self.factor
        return output


def test_experts_without_gates() -> None:
    plain = _drawn(Ungated(_config()))
    module = nn.Sequential(copy.deepcopy(plain))
    assert open_experts(module) == 1
    for num_tokens in (1, 7):
        inputs = _routed(num_tokens)
        torch.testing.assert_close(module[0](*inputs), plain(*inputs), atol=1e-4, rtol=1e-4)


class Doubled(Ungated):
    factor = 2.0


class Undescribed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("kind", [Doubled, Undescribed])
def test_others_are_left_alone_and_named(
    kind: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    experts = Undescribed() if kind is Undescribed else _drawn(Doubled(_config()))
    module = nn.Sequential(experts, experts)
    with caplog.at_level(logging.INFO):
        assert open_experts(module) == 0
    assert module[0] is experts
    assert isinstance(experts.down_proj, nn.Parameter)
    assert [record.message.split()[0] for record in caplog.records] == [kind.__name__]


def test_a_checkpoint_opens_those_that_it_names_if_they_can_be() -> None:
    kinds: list[nn.Module] = [Undescribed(), Ungated(_config()), Ungated(_config())]
    module = nn.Sequential(*kinds)
    assert open_experts(module, {"0.down_proj.0", "2.down_proj.0"}) == 1
    assert [isinstance(part, ExpertLinears) for part in module] == [False, False, True]


@needs_packing
def test_plain_tensors_are_let_go_one_after_the_other() -> None:
    module = nn.Sequential(*[_drawn(MixtralExperts(_config())) for _ in range(3)])
    tensors = [
        weakref.ref(cast("torch.Tensor", weight).untyped_storage())
        for weight in module.parameters()
    ]
    assert open_experts(module) == 3
    pack = packer(8)
    alive: list[int] = []

    def count(layer: nn.Linear) -> nn.Module | None:
        alive.append(sum(tensor() is not None for tensor in tensors))
        return pack(layer)

    replace_linears(module, count)
    assert alive == [6 - index // NUM_EXPERTS for index in range(6 * NUM_EXPERTS)]
    assert not any(tensor() is not None for tensor in tensors)
    assert all(isinstance(layer, ExpertLinears) for layer in module)
    assert sum(isinstance(layer, PackedLinear) for layer in module.modules()) == 6 * NUM_EXPERTS

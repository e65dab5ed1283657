"""Mixtures of experts in the engine: packed, quantized, and nothing of them left out.

That tokens are those of transformers is in test_token_exactness.py and test_architectures.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from baton.engine.experts import ExpertLinears
from baton.engine.linears import PackedLinear, can_prepack
from baton.engine.quantize import Quantization
from baton.engine.quantize_linears import QuantizedLinear
from baton.engine.quantize_model import write_checkpoint
from benchmarks.quantization.perplexity import DEMO, heldout_texts, load, make_windows, perplexity
from tests.model.conftest import TinyModel
from tests.model.harness import Driver, make_engine, make_prompts, make_spec

NUM_LAYERS = {"mixtral": 3, "qwen2_moe": 3, "gpt_oss": 2, "deepseek_v3": 2}
"""Those with experts, of 4 each."""


def _expert_layers(module: nn.Module) -> list[type[nn.Module]]:
    return [
        type(layer)
        for experts in module.modules()
        if isinstance(experts, ExpertLinears)
        for layer in experts.modules()
        if hasattr(layer, "in_features")
    ]


@pytest.mark.skipif(
    not can_prepack(torch.device("cpu"), torch.float32), reason="no packed linears here"
)
@pytest.mark.parametrize("kind", NUM_LAYERS)
def test_all_experts_are_packed(tiny_model: TinyModel, kind: str) -> None:
    with make_engine(tiny_model(kind)) as engine:
        module = engine._runner.model.module
        assert _expert_layers(module) == NUM_LAYERS[kind] * 8 * [PackedLinear]
        assert not [name for name, weight in module.named_parameters() if weight.dim() == 3]


@pytest.mark.parametrize("kind", NUM_LAYERS)
def test_all_experts_are_quantized_on_loading_and_in_checkpoints(
    tiny_model: TinyModel, tmp_path: Path, kind: str
) -> None:
    plain, out = tiny_model(kind), tmp_path / "out"
    sizes = write_checkpoint(str(plain), str(out), Quantization("int8"), lambda *_: None)
    assert sizes.num_expert_layers == NUM_LAYERS[kind] * 8
    with safe_open(out / "model-00001-of-00001.safetensors", "pt") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    experts = [tensor for name, tensor in written.items() if ".experts." in name]
    assert sum(tensor.dtype is torch.int8 for tensor in experts) == sizes.num_expert_layers
    assert not any(tensor.dim() > 1 and tensor.is_floating_point() for tensor in experts)
    outputs = []
    for directory, settings in ((out, {}), (plain, {"quantization": "int8"})):
        with make_engine(directory, **settings) as engine:
            made = _expert_layers(engine._runner.model.module)
            assert len(made) == sizes.num_expert_layers
            assert all(issubclass(layer, QuantizedLinear) for layer in made)
            for index, prompt in enumerate(make_prompts([5, 40, 90])):
                engine.sequences.submit(make_spec(str(index), prompt, 16))
            outputs.append(Driver(engine).run())
    assert outputs[0] == outputs[1]


def test_a_checkpoint_with_experts_left_alone_is_read_as_it_is(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("baton.engine.experts._can_open", lambda _experts: False)
        plain = str(tiny_model("mixtral"))
        sizes = write_checkpoint(plain, str(out), Quantization("int8"), lambda *_: None)
    assert sizes.num_expert_layers == 0
    with make_engine(out) as engine:
        assert set(_expert_layers(engine._runner.model.module)) <= {PackedLinear}
        engine.sequences.submit(make_spec("0", (1, 2, 3), 4))
        assert len(Driver(engine).run()["0"]) == 4


def test_fp8_leaves_experts_as_they_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    plain, out = str(tiny_model("mixtral")), str(tmp_path / "out")
    sizes = write_checkpoint(plain, out, Quantization("fp8"), lambda *_: None)
    assert (sizes.num_layers, sizes.num_expert_layers) == (12, 0)


def _upcycle(target: Path) -> Path:
    """The demo model with each MLP four times as an expert, its inner rows in different orders."""
    dense = AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True)
    settings = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.for_model(
        **{**settings, "model_type": "mixtral"}, num_local_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    mixture = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    shared = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    assert not mixture.load_state_dict(shared, strict=False).unexpected_keys
    with torch.no_grad():
        for source, made in zip(dense.model.layers, mixture.model.layers, strict=True):
            nn.init.normal_(made.mlp.gate.weight)
            for expert in range(4):
                order = torch.randperm(config.intermediate_size)
                parts = source.mlp.gate_proj.weight[order], source.mlp.up_proj.weight[order]
                made.mlp.experts.gate_up_proj[expert] = torch.cat(parts)
                made.mlp.experts.down_proj[expert] = source.mlp.down_proj.weight[:, order]
    mixture.save_pretrained(target)
    return target


@pytest.mark.skipif(not heldout_texts(2), reason="this Python has none of the held-out files")
def test_perplexity_of_a_mixture_stays_close(tmp_path: Path) -> None:
    windows = make_windows(DEMO, heldout_texts(2))
    mixture = _upcycle(tmp_path / "mixture")
    plain = perplexity(load(mixture), windows)
    assert plain == pytest.approx(perplexity(load(DEMO), windows), rel=2e-3), "the same function"
    for scheme, most in (("int8", 0.01), ("int8-dynamic", 0.01), ("int4", 0.05)):
        quantized = load(mixture, Quantization(scheme))
        assert len(_expert_layers(quantized)) == 5 * 8
        change = perplexity(quantized, windows) / plain - 1
        assert 0 < abs(change) < most

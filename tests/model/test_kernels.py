"""Whole models in bfloat16 through our own kernels, beside transformers in float32."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.core.hashing import KvLayout
from baton.engine.config import EngineConfig
from baton.engine.kernels import Product, find_products
from baton.engine.model import LoadedModel, load_model
from baton.engine.probe import _paged_logits
from baton.engine.quantize import Quantization
from tests.model.conftest import TinyModel

pytestmark = pytest.mark.skipif(
    find_products() is None, reason="no products for this CPU, or no C compiler"
)
NUM_TOKENS = 24
"""That `_paged_logits` computes in two steps."""


def _model(tiny_model: TinyModel, kind: str, directory: Path) -> Path:
    """A tiny model with heads of 32, which the attention kernel takes."""
    shutil.copytree(tiny_model(kind), directory)
    config = AutoConfig.from_pretrained(directory)
    config.head_dim = 32
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def _load(
    directory: Path, quantization: Quantization | None = None, **settings: str
) -> LoadedModel:
    return load_model(
        str(directory),
        EngineConfig(str(directory), "m", num_blocks=8, dtype="bfloat16", **settings),  # type: ignore[arg-type]
        on_progress=lambda *_: None,
        quantization=quantization,
    )


def _error(loaded: LoadedModel, directory: Path) -> float:
    """Median over tokens of the logits' relative difference."""
    token_ids = [(7 * index + 3) % 300 for index in range(NUM_TOKENS)]
    exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    layout: KvLayout = loaded.layout
    with torch.inference_mode():
        wanted = exact(torch.tensor([token_ids])).logits[0]
        found = _paged_logits(loaded.module, loaded.attention, layout, token_ids)
    error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    return float(error.median())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt_oss", "mixtral"])
@pytest.mark.parametrize(("kv_dtype", "most"), [("auto", 0.04), ("int8", 0.08)])
def test_logits_are_those_of_transformers(
    tiny_model: TinyModel, tmp_path: Path, kind: str, kv_dtype: str, most: float
) -> None:
    directory = _model(tiny_model, kind, tmp_path / "model")
    loaded = _load(directory, kv_dtype=kv_dtype)
    assert loaded.attention.num_layers_by_backend().keys() == {"paged"}
    assert _error(loaded, directory) < most


@pytest.mark.parametrize("quantization", [None, Quantization("int8", has_lm_head=True)])
def test_every_product_of_a_loaded_model_is_packed(
    tiny_model: TinyModel, tmp_path: Path, quantization: Quantization | None
) -> None:
    directory = _model(tiny_model, "llama", tmp_path / "model")
    loaded = _load(directory, quantization)
    found = [getattr(part, "product", None) for part in loaded.module.modules()]
    products = [product for product in found if isinstance(product, Product)]
    # Query, key and value; output; gate and up; down; and the output layer.
    assert len(products) == 4 * loaded.layout.num_layers + 1
    assert not [product for product in products if product.parts]
    assert _error(loaded, directory) < 0.06

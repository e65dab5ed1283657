"""Whole models with quantized linears: made from a plain model, written, and read again.

A checkpoint of ours is a model directory like any other: safetensors and config.json, whose
`quantization_config` names our method. A quantized layer's tensors are beside each other as
`<layer>.qweight`, `<layer>.scale`, `<layer>.zero` (int4) and `<layer>.bias`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from baton.core.errors import InvalidRequest, ModelNotFound, Unsupported
from baton.engine.config import OnProgress
from baton.engine.experts import ExpertLinears, open_experts
from baton.engine.fusion import SIBLINGS, merge_siblings, place_siblings
from baton.engine.kv_cache import torch_dtype
from baton.engine.quantize import Quantization, quantization_of, quantize_weight
from baton.engine.quantize_linears import check_device, make_linear

_MIN_OUT_FEATURES = 32
"""Narrower layers are gates and routers: small, and sensitive."""
_SHARD_BYTES = 4 << 30
_QWEIGHT = ".qweight"
_PARTS = ("qweight", "scale", "zero", "bias")
_SIBLINGS = (*SIBLINGS, ("gate_proj", "up_proj"))
"""Layers with the same input are computed as one, so that it is rounded once."""


@dataclass(frozen=True, slots=True)
class QuantizedSizes:
    """Sizes of a model before and after quantization."""

    num_layers: int
    """Layers quantized, those of experts included."""
    num_expert_layers: int
    """Those of mixtures of experts alone."""
    plain_bytes: int
    """All weights before."""
    quantized_bytes: int
    """All weights after, those left as they are included."""


def quantize_model(
    module: PreTrainedModel, quantization: Quantization, on_progress: OnProgress
) -> None:
    """Replaces a model's linear layers in place, one at a time; embeddings stay.

    Raises:
        Unsupported: the model has no layer that can be quantized, or one that does not fit.
    """
    check_device(quantization.scheme, module.device, module.dtype)
    _open_experts(module, quantization)
    merge_siblings(module, _SIBLINGS)
    for name, layer, tensors in _quantized(module, quantization, on_progress):
        bias = None if layer.bias is None else layer.bias.detach()
        made = make_linear(quantization.scheme, tensors, bias, layer.weight.dtype)
        module.set_submodule(name, made)


def _open_experts(module: PreTrainedModel, quantization: Quantization) -> None:
    """Not for CUDA, where going from expert to expert waits for the device at each layer."""
    if quantization.scheme != "fp8":
        open_experts(module)


def _quantized(
    module: PreTrainedModel, quantization: Quantization, on_progress: OnProgress
) -> Iterator[tuple[str, Any, dict[str, torch.Tensor]]]:
    names = list(_layers(module, with_lm_head=quantization.has_lm_head))
    if not names:
        raise Unsupported("the model has no linear layers that can be quantized")
    for index, name in enumerate(names):
        layer: Any = module.get_submodule(name)
        weight = layer.weight.detach()
        try:
            tensors = quantize_weight(
                weight.t() if isinstance(layer, Conv1D) else weight, quantization
            )
        except Unsupported as error:
            raise Unsupported(f"layer {name}: {error.message}") from error
        yield name, layer, tensors
        on_progress((index + 1) / len(names), f"quantizing to {quantization.text}")


def _layers(module: PreTrainedModel, *, with_lm_head: bool) -> Iterator[str]:
    lm_head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, layer in module.named_modules():
        if layer is lm_head and not with_lm_head:
            continue
        # Subclasses compute something else.
        if type(layer) in {nn.Linear, Conv1D}:
            num_out = layer.nf if isinstance(layer, Conv1D) else layer.out_features
            if int(num_out) >= _MIN_OUT_FEATURES:
                yield name


def _plain_tensors(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors by name; one that several layers share is there once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in module.state_dict().items():
        key = tensor.data_ptr(), tuple(tensor.shape)
        if key not in seen:
            seen.add(key)
            tensors[name] = tensor
    return tensors


def write_checkpoint(
    model_path: str, out_path: str, quantization: Quantization, on_progress: OnProgress
) -> QuantizedSizes:
    """Writes a quantized checkpoint of a model's directory.

    Raises:
        InvalidRequest: there is something at `out_path`.
        ModelNotFound, Unsupported: the model cannot be quantized; the message says why.
    """
    source, target = Path(model_path), Path(out_path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidRequest(f"{target} exists and is not empty")
    if not (source / "config.json").is_file():
        raise ModelNotFound(f"{source} has no config.json")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if quantization_of(config) is not None:
        raise Unsupported(f"{source} is quantized already")
    on_progress(0.0, f"reading {source.name}")
    module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", local_files_only=True, use_safetensors=True
    )
    _open_experts(module, quantization)
    tensors = _plain_tensors(module)
    plain_bytes = sum(tensor.nbytes for tensor in tensors.values())
    experts = tuple(
        f"{path}." for path, part in module.named_modules() if isinstance(part, ExpertLinears)
    )
    num_layers, num_expert_layers = 0, 0
    embedding_weight = getattr(module.get_input_embeddings(), "weight", None)
    for name, layer, parts in _quantized(
        module, quantization, lambda done, text: on_progress(0.9 * done, text)
    ):
        if layer.weight is not embedding_weight:
            tensors.pop(f"{name}.weight", None)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        # An expert's plain weight is let go with the last of its tensor.
        module.set_submodule(name, nn.Identity())
        num_layers += 1
        num_expert_layers += name.startswith(experts)
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and not _is_weights(path):
            shutil.copyfile(path, target / path.name)
    on_progress(0.9, "writing weights")
    _write_shards(tensors, target)
    # Last: a directory without config.json is no model, so an interrupted write leaves none.
    document = json.dumps({**config, "quantization_config": quantization.to_config()}, indent=2)
    (target / "config.json").write_text(document + "\n", encoding="utf-8")
    on_progress(1.0, f"wrote {target}")
    return QuantizedSizes(
        num_layers=num_layers,
        num_expert_layers=num_expert_layers,
        plain_bytes=plain_bytes,
        quantized_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _is_weights(path: Path) -> bool:
    suffixes = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
    return (
        path.suffix in suffixes or path.name.endswith(".index.json") or path.name == "config.json"
    )


def _write_shards(tensors: Mapping[str, torch.Tensor], target: Path) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor.contiguous()
        num_bytes += tensor.nbytes
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where weights come from and where they go."""

    directory: Path
    config: PreTrainedConfig
    attention_name: str
    device: torch.device
    is_random: bool = False
    """Weights are drawn on the device instead of read: for measuring speed only."""


def load_weights(
    source: WeightSource,
    dtype: torch.dtype | None,
    wanted: Quantization | None,
    on_progress: OnProgress,
) -> PreTrainedModel:
    """Loads a checkpoint, plain or ours; `dtype` None takes the checkpoint's.

    A plain one is quantized as `wanted`, and `source.config` then says so.

    Raises:
        Unsupported: the checkpoint is quantized in another way than `wanted`, does not fit the
            model, or cannot be quantized; or the device cannot run it.
    """
    saved = quantization_of(source.config.to_dict())
    if saved is not None:
        if wanted not in {None, saved}:
            raise Unsupported(
                f"the checkpoint is quantized to {saved.text}: quantize the plain model otherwise, "
                "or leave the setting empty"
            )
        return _load_quantized(source, dtype, saved)
    models: Any = AutoModelForCausalLM
    if source.is_random:
        with source.device:
            loaded = models.from_config(
                source.config,
                dtype=dtype or source.config.dtype,
                attn_implementation=source.attention_name,
            )
    else:
        loaded = models.from_pretrained(
            source.directory,
            config=source.config,
            dtype=dtype or "auto",
            attn_implementation=source.attention_name,
            local_files_only=True,
            use_safetensors=True,
            # Straight to the device, without a copy of the model in host memory.
            device_map=None if source.device.type == "cpu" else {"": source.device},
        )
    module: PreTrainedModel = loaded.to(source.device).eval().requires_grad_(False)  # noqa: FBT003
    if wanted is not None:
        quantize_model(module, wanted, lambda done, text: on_progress(0.1 + 0.7 * done, text))
        source.config.quantization_config = wanted.to_config()
    return module


def _load_quantized(
    source: WeightSource, dtype: torch.dtype | None, quantization: Quantization
) -> PreTrainedModel:
    """The files are mapped, not read: weights are copied only into a kernel's own layout."""
    directory, config, device = source.directory, source.config, source.device
    wanted = dtype or config.dtype or torch.float32
    if isinstance(wanted, str):
        wanted = torch_dtype(wanted)
    check_device(quantization.scheme, device, wanted)
    models: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        module: PreTrainedModel = models.from_config(
            config, dtype=wanted, attn_implementation=source.attention_name
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path, device=str(device))
    open_experts(module, {name.rpartition(".")[0] for name in tensors})
    _place_layers(module, quantization, tensors, wanted)
    plain = {
        name: tensor.to(wanted) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    unexpected = module.load_state_dict(plain, strict=False, assign=True).unexpected_keys
    module.tie_weights()
    missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if unexpected or missing:
        raise Unsupported(
            f"{directory} does not fit its config: unexpected {unexpected[:4]}, "
            f"missing {missing[:4]}"
        )
    if (directory / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(directory)
    module.to(device)  # type: ignore[arg-type]  # buffers: the weights are there
    module.train(False).requires_grad_(False)  # noqa: FBT003
    return module


def _place_layers(
    module: PreTrainedModel,
    quantization: Quantization,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Takes the quantized layers' tensors out of `tensors` and puts the layers in place."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in [name for name in tensors if name.endswith(_QWEIGHT)]:
        layer = name.removesuffix(_QWEIGHT)
        found[layer] = {
            part: tensors.pop(f"{layer}.{part}") for part in _PARTS if f"{layer}.{part}" in tensors
        }
    layers = dict(module.named_modules())
    for name, parts in found.items():
        if name not in layers or not {"qweight", "scale"} <= parts.keys():
            raise Unsupported(f"layer {name} of the checkpoint does not fit the model")
    merged = _merge(module, found)
    for name, parts in {**found, **merged}.items():
        bias = parts.pop("bias", None)
        bias = None if bias is None else bias.to(dtype)
        module.set_submodule(name, make_linear(quantization.scheme, parts, bias, dtype))


def _merge(
    module: PreTrainedModel, found: dict[str, dict[str, torch.Tensor]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Takes siblings out of `found` and puts places for them into the model.

    Returns:
        The siblings' tensors, by the names of those places.
    """
    merged: dict[str, dict[str, torch.Tensor]] = {}
    for siblings in _SIBLINGS:
        for first_name in [name for name in found if name.split(".")[-1] == siblings[0]]:
            parent = first_name.removesuffix(siblings[0])
            names = [parent + sibling for sibling in siblings]
            # With a bias in some of them only, they stay apart, as those of a plain model do.
            if len({tuple(found.get(name, ())) for name in names}) > 1:
                continue
            layers = [found.pop(name) for name in names]
            merged[f"{first_name}.merged"] = {
                part: torch.cat([layer[part] for layer in layers]) for part in layers[0]
            }
            sizes = [len(layer["qweight"]) for layer in layers]
            place_siblings(module, names, nn.Identity(), sizes)
    return merged

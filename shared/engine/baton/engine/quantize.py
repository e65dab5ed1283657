"""Quantization of linear weights: the schemes, and the rounding of each. Nothing computes here.

Scales are values that bfloat16 holds, so that no kernel rounds them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from baton.core.errors import InvalidRequest, Unsupported
from baton.engine.config import INT4_GROUP_SIZES, QUANTIZATIONS

METHOD = "baton"
"""`quant_method` of our checkpoints' `quantization_config`."""
FORMAT_VERSION = 1
DEFAULT_GROUP_SIZE = 64
INT8_MAX = 127
INT4_MAX = 15
INT4_ZERO = 8
"""An int4 weight q stands for (q - 8) * scale + zero: what torch's int4 kernels take."""
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Quantization:
    """How linear layers are stored and computed.

    Raises:
        InvalidRequest: a value is out of range; the message names it.
    """

    scheme: str
    """"int8", "int8-dynamic", "int4" or "fp8"."""
    group_size: int = DEFAULT_GROUP_SIZE
    """Input features that share a scale; int4 only."""
    has_lm_head: bool = False
    """Whether the output layer is quantized too. Embeddings never are."""

    def __post_init__(self) -> None:
        if self.scheme not in QUANTIZATIONS:
            raise InvalidRequest(
                f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.scheme}"
            )
        if self.group_size not in INT4_GROUP_SIZES:
            sizes = ", ".join(str(size) for size in INT4_GROUP_SIZES)
            raise InvalidRequest(f"group size must be one of {sizes}, got {self.group_size}")

    @property
    def text(self) -> str:
        """The scheme, with the group size where it has one, such as "int4 (groups of 64)"."""
        groups = f" (groups of {self.group_size})" if self.scheme == "int4" else ""
        return self.scheme + groups + (" with lm_head" if self.has_lm_head else "")

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        groups = {"group_size": self.group_size} if self.scheme == "int4" else {}
        return {
            "quant_method": METHOD,
            "version": FORMAT_VERSION,
            "scheme": self.scheme,
            "lm_head": self.has_lm_head,
            **groups,
        }


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says; None for a checkpoint of plain weights.

    Raises:
        Unsupported: another tool or a later version quantized it.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method")
    if method != METHOD:
        raise Unsupported(
            f"the checkpoint is quantized by {method}; only plain weights and those that "
            "`baton quantize` makes of them are served"
        )
    if found.get("version") != FORMAT_VERSION:
        raise Unsupported(
            f"the checkpoint has version {found.get('version')} of Baton's quantization; "
            f"this engine reads version {FORMAT_VERSION}"
        )
    return Quantization(
        found["scheme"],
        group_size=found.get("group_size", DEFAULT_GROUP_SIZE),
        has_lm_head=found.get("lm_head", False),
    )


def quantize_weight(weight: torch.Tensor, quantization: Quantization) -> dict[str, torch.Tensor]:
    """Rounds a weight of shape [out_features, in_features].

    Returns:
        `qweight` and `scale`, and for int4 `zero`:
        int8 [out, in] with float32 [out];
        uint8 [out, in / 2], the even column in the low half, with bfloat16 [out, in / group_size];
        float8_e4m3fn [out, in] with float32 [out].

    Raises:
        Unsupported: the weight does not divide into groups, or has NaN or infinity.
    """
    if not weight.isfinite().all():
        raise Unsupported("the weight has NaN or infinity: the checkpoint is damaged")
    weight = weight.contiguous()  # kernels take memory as it lies
    if quantization.scheme == "int4":
        return _quantize_int4(weight, quantization.group_size)
    is_fp8 = quantization.scheme == "fp8"
    scale = _scale_of(weight.float().abs().amax(1), FP8_MAX if is_fp8 else INT8_MAX)
    scaled = weight.float() / scale[:, None]
    rounded = scaled.to(torch.float8_e4m3fn) if is_fp8 else scaled.round_().to(torch.int8)
    return {"qweight": rounded, "scale": scale}


def _scale_of(largest: torch.Tensor, max_value: float) -> torch.Tensor:
    """`largest / max_value` rounded up to bfloat16, float32; 1 where all weights are 0."""
    exact = largest / max_value
    nearest = exact.bfloat16()
    above = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    scale = torch.where(nearest < exact, above, nearest).float()
    return torch.where(scale > 0, scale, 1.0)


def _quantize_int4(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    num_out, num_in = weight.shape
    if num_in % group_size:
        fitting = [str(size) for size in INT4_GROUP_SIZES if num_in % size == 0]
        raise Unsupported(
            f"{num_in} input features do not divide into groups of {group_size}; "
            f"group sizes that fit: {', '.join(fitting) or 'none'}"
        )
    groups = weight.float().view(num_out, -1, group_size)
    low, high = groups.amin(2), groups.amax(2)
    scale = _scale_of(high - low, INT4_MAX)
    # A group of equal weights is its zero alone, at the level that the scale does not move.
    zero = torch.where(low == high, low, low + INT4_ZERO * scale).bfloat16().float()
    rounded = ((groups - zero[..., None]) / scale[..., None]).round_().add_(INT4_ZERO)
    levels = rounded.clamp_(0, INT4_MAX).to(torch.uint8).view(num_out, num_in)
    return {
        "qweight": levels[:, 0::2] | (levels[:, 1::2] << 4),
        "scale": scale.bfloat16(),
        "zero": zero.bfloat16(),
    }


def int4_levels(qweight: torch.Tensor) -> torch.Tensor:
    """The 4-bit values of an int4 weight, uint8 [out_features, in_features]."""
    return torch.stack([qweight & 15, qweight >> 4], dim=2).view(qweight.shape[0], -1)


def dequantize_int4(
    qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The weight that an int4 weight stands for, [out_features, in_features]."""
    num_out, num_groups = scale.shape
    levels = int4_levels(qweight).view(num_out, num_groups, -1).to(dtype).sub_(INT4_ZERO)
    scaled = levels.mul_(scale[..., None].to(dtype)).add_(zero[..., None].to(dtype))
    return scaled.view(num_out, -1)

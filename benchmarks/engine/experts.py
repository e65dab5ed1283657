"""Times the experts of a mixture as the engine computes them beside transformers' own ways.

    python -m benchmarks.engine.experts --threads 1
    python -m benchmarks.engine.experts --hidden 2048 --inner 1024 --experts 64 --top 8 --json

Random weights in a few layers, so that they come from memory, and random routing. "loop" is
transformers' own loop over experts, "grouped_mm" what it takes by default. All take turns on the
same tokens; a figure is the median of the ratios to the loop of the same turn, more is faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from operator import truediv
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from baton.engine.experts import open_experts
from baton.engine.linears import LinearFactory, packer, replace_linears
from baton.engine.quantize import Quantization, quantize_weight
from baton.engine.quantize_linears import has_int8_kernels, make_linear
from benchmarks.engine.floors import timed

_LOOP = "loop"
_PACKED_ROWS = 64
Layers = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; ends the process on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hidden", type=int, default=1024, help="hidden size (default: %(default)s)")
    add("--inner", type=int, default=512, help="size within an expert (default: %(default)s)")
    add("--experts", type=int, default=32, help="experts of a layer (default: %(default)s)")
    add("--top", type=int, default=4, help="experts per token (default: %(default)s)")
    add("--layers", type=int, default=3, help="layers (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 4, 16, 64, 512], help="tokens per step")
    add("--turns", type=int, default=15, help="turns per batch (default: %(default)s)")
    add("--threads", type=int, help="threads to compute with (default: torch's own choice)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


def _quantizer(scheme: str) -> LinearFactory:
    def quantize(layer: nn.Linear) -> nn.Module:
        tensors = quantize_weight(layer.weight, Quantization(scheme))
        return make_linear(scheme, tensors, layer.bias, layer.weight.dtype)

    return quantize


def make_variants(options: argparse.Namespace) -> dict[str, Layers]:
    """Ways to compute the same layers, by name; the loop is the first."""
    config: Any = AutoConfig.for_model(
        "qwen2_moe",
        hidden_size=options.hidden,
        moe_intermediate_size=options.inner,
        num_experts=options.experts,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    layers = nn.ModuleList()
    for _ in range(options.layers):
        layer = Qwen2MoeExperts(config).to(getattr(torch, options.dtype))
        for weight in layer.parameters():
            nn.init.normal_(weight, std=0.03)
        layers.append(layer)

    def own(implementation: str) -> Layers:
        def compute(*arguments: torch.Tensor) -> None:
            config._experts_implementation = implementation
            for layer in layers:
                layer(*arguments)

        return compute

    def ours(factory: LinearFactory) -> Layers:
        made = copy.deepcopy(layers)
        if open_experts(made) < options.layers:
            raise SystemExit("the experts were left alone")
        replace_linears(made, factory)

        def compute(*arguments: torch.Tensor) -> None:
            for layer in made:
                layer(*arguments)

        return compute

    factories = {"packed": packer(_PACKED_ROWS)}
    schemes = ("int8", "int8-dynamic", "int4") if has_int8_kernels() else ("int8", "int4")
    factories |= {scheme: _quantizer(scheme) for scheme in schemes}
    return {
        _LOOP: own("eager"),
        "grouped_mm": own("grouped_mm"),
        **{name: ours(factory) for name, factory in factories.items()},
    }


def measure(variants: dict[str, Layers], batch: int, options: argparse.Namespace) -> list[float]:
    """Seconds of the loop for one turn, and how many times as fast the others are; medians."""
    dtype = getattr(torch, options.dtype)
    times_s: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.turns):
        chosen = torch.rand(batch, options.experts).topk(options.top).indices
        inputs, shares = torch.randn(batch, options.hidden), torch.rand(batch, options.top)
        arguments = inputs.to(dtype), chosen, shares.to(dtype)
        for name, compute in variants.items():
            times_s[name].append(timed(lambda: compute(*arguments), inputs.device))  # noqa: B023
    loop_s = times_s.pop(_LOOP)
    return [
        median(loop_s),
        *(median(map(truediv, loop_s, own_s)) for own_s in times_s.values()),
    ]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    """Prints a table and, if asked, one JSON line last."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    sys.stderr.write("  ... making the layers\n")
    variants = make_variants(options)
    names = [name for name in variants if name != _LOOP]
    sys.stdout.write("| tokens | loop, ms | " + " | ".join(names) + " |\n")
    sys.stdout.write("|---" * (2 + len(names)) + "|\n")
    ratios: dict[str, dict[str, float]] = {}
    for batch in options.batch:
        loop_s, *found = measure(variants, batch, options)
        ratios[str(batch)] = {
            name: round(ratio, 3) for name, ratio in zip(names, found, strict=True)
        }
        cells = " | ".join(f"{ratio:.2f}" for ratio in found)
        sys.stdout.write(f"| {batch} | {loop_s / options.layers * 1e3:.2f} | {cells} |\n")
        sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps({"dtype": options.dtype, "over_loop": ratios}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

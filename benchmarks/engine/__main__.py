"""Times the engine's decode steps and prompts beside what the hardware can do at most.

    python -m benchmarks.engine
    python -m benchmarks.engine --model qwen2-0.5b --threads 2 --json
    python -m benchmarks.engine --model demo --batch 1 64 --context 128 2048
    python -m benchmarks.engine --device cuda --model llama-3.1-8b --batch 1 64 --prompt 4096 --json

No service is started and nothing is downloaded: weights are random, of the shape that is named.
"of floor" is 1 when a decode step takes no longer than reading its weights and KV once, and a
prompt no longer than its matrix products (weights that stay in a cache can make it more than 1).
Both floors are measured again every few steps, because they move with what else the machine does.
Compare such shares, not milliseconds, and quote hardware and command with them.

On a GPU random weights are drawn on the device, decode steps are captured as CUDA graphs, and
transformers and int8 are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

from baton.core.errors import BatonError
from baton.engine.devices import check_device, default_block_size
from benchmarks.engine.floors import Floors
from benchmarks.engine.measure import Bench, DecodeTimes, PrefillTimes
from benchmarks.engine.quantized import QuantizedFigures, measure_quantized
from benchmarks.engine.shapes import NAMES, model_directory

_KV_MARGIN_TOKENS = 128


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; ends the process on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=NAMES, default="demo", help="shape to measure (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 4, 16, 64], help="sequences per decode step")
    add("--context", type=int, nargs="+", default=[512], help="tokens in context, 128 to 4096")
    add("--prompt", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    add("--steps", type=int, default=6, help="steps per batch and pass (default: %(default)s)")
    add("--passes", type=int, default=2, help="rounds over all batches (default: %(default)s)")
    add("--threads", type=int, help="threads to compute with (default: torch's own choice)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--plain-linears", action="store_true", help="measure without packed weights")
    add("--no-graphs", action="store_true", help="measure without CUDA graphs")
    add("--no-transformers", action="store_true", help="leave the comparison with generate out")
    add("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    for name in ("batch", "context"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        check_device(options.device)
    except BatonError as error:
        parser.error(f"--device: {error.message}")
    return options


def _is_drawn(options: argparse.Namespace) -> bool:
    """Whether weights are drawn on the device: there is no file then that others could load."""
    return options.device != "cpu" and options.model != "demo"


def say(text: str = "") -> None:
    """A line for people."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Progress."""
    sys.stderr.write(f"  ... {text}\n")
    sys.stderr.flush()


def make_bench(options: argparse.Namespace, directory: Path, floors: Floors) -> Bench:
    """An engine with room for the largest batch and context that is asked for."""
    device = check_device(options.device)
    block_size = default_block_size(device)
    num_sequences = max(*options.batch, 16)
    row_blocks = -(-(max(options.context) + _KV_MARGIN_TOKENS) // block_size)
    prompt_blocks = -(-(options.prompt + _KV_MARGIN_TOKENS) // block_size)
    num_blocks = num_sequences * row_blocks + prompt_blocks
    return Bench(
        directory,
        floors,
        settings={
            "device": options.device,
            "dtype": options.dtype,
            "num_blocks": num_blocks,
            "random_weights": _is_drawn(options),
            "cuda_graphs": not options.no_graphs,
            "max_num_batched_tokens": max(options.prompt, *options.batch),
            "max_num_seqs": num_sequences,
            "num_threads": options.threads,
            "prepack_linears": not options.plain_linears,
        },
    )


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures everything, prints the table, returns the figures."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    note(f"making {options.model}")
    directory = model_directory(options.model, dtype, scratch, has_weights=not _is_drawn(options))
    floors = Floors(torch.device(options.device), dtype)
    note("loading the engine")
    bench = make_bench(options, directory, floors)
    say(
        f"{options.model}, {options.dtype}, {options.device}, {torch.get_num_threads()} threads, "
        f"{bench.num_parameters / 1e6:.0f} M parameters, loaded in {bench.load_s:.1f} s"
    )
    decodes = [DecodeTimes(batch, ctx) for ctx in options.context for batch in options.batch]
    prefill = PrefillTimes(options.prompt)
    for index in range(options.passes):
        for times in decodes:
            note(f"pass {index + 1}: decode, batch {times.batch}, context {times.context}")
            bench.decode(times, options.steps)
        note(f"pass {index + 1}: a prompt of {options.prompt} tokens")
        bench.prefill(prefill, max(2, options.steps // 2))
    print_table(decodes, prefill, floors)
    figures = summarize(decodes, prefill, floors)
    for batch in (1, 16):
        figures[f"vs_transformers_b{batch}"] = None
        if not options.no_transformers and options.device == "cpu":
            note(f"against transformers.generate, batch {batch}")
            ratio = bench.against_transformers(batch, options.context[0], options.steps * 2)
            figures[f"vs_transformers_b{batch}"] = round(ratio, 3)
            say(f"batch {batch}: {ratio:.2f} times the tokens per second of transformers.generate")
    figures |= device_figures(bench, decodes, prefill)
    bench.close()
    quantized = QuantizedFigures()
    if options.device == "cpu":
        note("int8 against bfloat16")
        quantized = measure_quantized(directory, options.context[0], options.steps)
    figures["int8_decode_speedup"] = quantized.int8_decode_speedup
    figures["int8_perplexity_change"] = quantized.int8_perplexity_change
    return {
        "model": options.model,
        "device": options.device,
        "threads": torch.get_num_threads(),
        **figures,
    }


def print_table(decodes: list[DecodeTimes], prefill: PrefillTimes, floors: Floors) -> None:
    """Steps beside their floors."""
    say(
        f"floors: read {median(floors.bytes_per_s) / 1e9:.1f} GB/s "
        f"({min(floors.bytes_per_s) / 1e9:.1f} to {max(floors.bytes_per_s) / 1e9:.1f}), "
        f"product {median(floors.flops) / 1e9:.0f} GFLOP/s "
        f"({min(floors.flops) / 1e9:.0f} to {max(floors.flops) / 1e9:.0f})"
    )
    say(f"{'decode':>14}{'step ms':>10}{'floor ms':>10}{'of floor':>10}{'tok/s':>9}{'outside':>9}")
    for times in decodes:
        say(
            f"{times.batch:>5} x {times.context:<6}{median(times.step_s) * 1e3:>10.2f}"
            f"{median(times.floor_s) * 1e3:>10.2f}{times.floor_fraction:>10.2f}"
            f"{times.tokens_per_s:>9.1f}{times.overhead_fraction:>9.1%}"
        )
    step_s = median(prefill.step_s)
    say(
        f"prompt {prefill.num_tokens:<7}{step_s * 1e3:>10.1f}{median(prefill.floor_s) * 1e3:>10.1f}"
        f"{prefill.floor_fraction:>10.2f}{prefill.num_tokens / step_s:>9.0f}"
    )


def summarize(decodes: list[DecodeTimes], prefill: PrefillTimes, floors: Floors) -> dict[str, Any]:
    """The figures by name; null for a batch that was not measured."""
    by_batch = {times.batch: times for times in reversed(decodes)}
    one, sixteen = by_batch.get(1), by_batch.get(16)
    ratio = sixteen.tokens_per_s / one.tokens_per_s if one and sixteen else None
    return {
        "read_gb_per_s": round(median(floors.bytes_per_s) / 1e9, 1),
        "gemm_gflop_per_s": round(median(floors.flops) / 1e9),
        "decode_b1_floor_fraction": round(one.floor_fraction, 3) if one else None,
        "decode_b16_over_b1": round(ratio, 3) if ratio else None,
        "prefill_floor_fraction": round(prefill.floor_fraction, 3),
        "overhead_fraction": round(sixteen.overhead_fraction, 4) if sixteen else None,
    }


def device_figures(
    bench: Bench, decodes: list[DecodeTimes], prefill: PrefillTimes
) -> dict[str, Any]:
    """Speeds by batch, and how the steps were computed."""
    names = ("varlen_layers", "paged_layers", "sdpa_layers", "graph_steps", "eager_steps")
    counters = {name: int(bench.counters.get(name, 0)) for name in names}
    say(", ".join(f"{name} {count}" for name, count in counters.items()))
    return {
        **counters,
        "decode_floor_fraction": {
            f"{times.batch}x{times.context}": round(times.floor_fraction, 3) for times in decodes
        },
        "decode_tokens_per_s": {
            f"{times.batch}x{times.context}": round(times.tokens_per_s, 1) for times in decodes
        },
        "prefill_tokens_per_s": round(prefill.num_tokens / median(prefill.step_s)),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    options = parse(argv)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="baton-benchmark-") as scratch:
        figures = run(options, Path(scratch))
    say(f"measured in {time.monotonic() - started_s:.0f} s")
    if options.json:
        say(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

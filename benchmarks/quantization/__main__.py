"""Compares quantization schemes: size, speed, and perplexity on held-out text.

    python -m benchmarks.quantization
    python -m benchmarks.quantization --model qwen2-0.5b --threads 2 --json
    python -m benchmarks.quantization --kv

Perplexity is the demo model's, on modules of the standard library that it was not trained on;
models of other shapes have random weights, and none. All variants take turns, so compare within
one table, and quote hardware and command with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from baton.core.errors import Unsupported
from baton.engine.quantize import Quantization
from baton.engine.quantize_model import write_checkpoint
from benchmarks.engine.shapes import NAMES, model_directory
from benchmarks.quantization.kv import kv_table, measure_kv
from benchmarks.quantization.perplexity import (
    DEMO,
    heldout_texts,
    load,
    make_windows,
    perplexity,
)
from benchmarks.quantization.speed import Speed, Workload, measure_speed

VARIANTS = {
    "int8": Quantization("int8"),
    "int8, lm_head too": Quantization("int8", has_lm_head=True),
    "int8-dynamic": Quantization("int8-dynamic"),
    "int8-dynamic, lm_head too": Quantization("int8-dynamic", has_lm_head=True),
    "int4, groups of 32": Quantization("int4", group_size=32),
    "int4, groups of 64": Quantization("int4", group_size=64),
    "int4, groups of 128": Quantization("int4", group_size=128),
}
BASE = "bfloat16"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One variant."""

    name: str
    num_bytes: int
    """Of its safetensors files."""
    speed: Speed
    perplexity: float | None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; ends the process on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=NAMES, default="demo", help="shape to measure (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 4, 16], help="sequences per decode step")
    add("--context", type=int, default=512, help="tokens in context (default: %(default)s)")
    add("--prompt", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    add("--steps", type=int, default=6, help="steps per batch and round (default: %(default)s)")
    add("--rounds", type=int, default=5, help="turns of every variant (default: %(default)s)")
    add("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--threads", type=int, help="threads to compute with (default: torch's own choice)")
    add("--max-files", type=int, help="perplexity on the first held-out files only")
    add("--kv", action="store_true", help="compare ways to keep the demo model's KV instead")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """One row per variant; a variant that does not fit the model is left out, and named."""
    plain = model_directory(options.model, torch.bfloat16, scratch)
    directories = {BASE: plain}
    for name in options.variant:
        quantization = VARIANTS[name]
        out = scratch / name.replace(", ", "-").replace(" ", "-")
        try:
            write_checkpoint(str(plain), str(out), quantization, lambda _fraction, _text: None)
        except Unsupported as error:
            sys.stderr.write(f"{name} is left out: {error}\n")
            continue
        directories[name] = out
    workload = Workload(
        options.batch, options.context, options.prompt, options.steps, options.rounds
    )
    speeds = measure_speed({name: (path, {}) for name, path in directories.items()}, workload)
    perplexities: dict[str, float] = {}
    if options.model == "demo":
        windows = make_windows(plain, heldout_texts(options.max_files))
        for name, path in directories.items():
            sys.stderr.write(f"perplexity of {name}\n")
            perplexities[name] = perplexity(load(path), windows)
    return [
        Row(
            name,
            sum(file.stat().st_size for file in path.glob("*.safetensors")),
            speeds[name],
            perplexities.get(name),
        )
        for name, path in directories.items()
    ]


def as_table(rows: list[Row], options: argparse.Namespace) -> str:
    """Markdown, each figure with its ratio to the plain weights."""
    base = rows[0]
    decodes = "".join(f" decode, batch {batch}, tokens/s |" for batch in options.batch)
    lines = [
        f"| weights | MiB |{decodes} prefill, tokens/s | perplexity |",
        "|---|---|" + "---|" * len(options.batch) + "---|---|",
    ]
    for row in rows:
        cells = [f"{row.num_bytes / _MIB:.1f} ({row.num_bytes / base.num_bytes:.2f})"]
        for batch in options.batch:
            rate, base_rate = row.speed.tokens_per_s(batch), base.speed.tokens_per_s(batch)
            cells.append(f"{rate:.0f} ({rate / base_rate:.2f})")
        rate, base_rate = row.speed.prompt_tokens_per_s, base.speed.prompt_tokens_per_s
        cells.append(f"{rate:.0f} ({rate / base_rate:.2f})")
        cells.append(_perplexity_cell(row, base))
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _perplexity_cell(row: Row, base: Row) -> str:
    if row.perplexity is None or base.perplexity is None:
        return "-"
    return f"{row.perplexity:.4f} ({row.perplexity / base.perplexity - 1:+.2%})"


def as_document(rows: list[Row], options: argparse.Namespace) -> dict[str, Any]:
    """The same for programs."""
    base = rows[0]
    return {
        "model": options.model,
        "threads": torch.get_num_threads(),
        "context": options.context,
        "prompt": options.prompt,
        "variants": {
            row.name: {
                "bytes": row.num_bytes,
                **{
                    f"decode_b{batch}_tokens_per_s": round(row.speed.tokens_per_s(batch), 2)
                    for batch in options.batch
                },
                "prefill_tokens_per_s": round(row.speed.prompt_tokens_per_s, 1),
                "perplexity": row.perplexity,
                "perplexity_change": None
                if row.perplexity is None or base.perplexity is None
                else row.perplexity / base.perplexity - 1,
            }
            for row in rows
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the table and, if asked, one JSON line last."""
    options = parse(argv)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.kv:
        kv_rows = measure_kv(make_windows(DEMO, heldout_texts(options.max_files)))
        sys.stdout.write(kv_table(kv_rows))
        if options.json:
            sys.stdout.write(json.dumps({"kv": [asdict(row) for row in kv_rows]}) + "\n")
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options, Path(scratch))
    sys.stdout.write(as_table(rows, options))
    if options.json:
        sys.stdout.write(json.dumps(as_document(rows, options)) + "\n")


if __name__ == "__main__":
    main()

"""`baton quantize`: a smaller and faster checkpoint of a model, made on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from baton.core.errors import Unsupported

_MIB = 1 << 20


def quantize(
    model: Path, out: Path, scheme: str, *, group_size: int, lm_head: bool, as_json: bool
) -> None:
    """Writes the checkpoint and prints what it came to; progress goes to standard error.

    Raises:
        InvalidRequest, ModelNotFound, Unsupported: it cannot be made; the message says why.
    """
    try:
        # Takes seconds and needs torch, which the other commands do without.
        from baton.engine.quantize import Quantization  # noqa: PLC0415
        from baton.engine.quantize_model import write_checkpoint  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise Unsupported(
            f"quantizing needs {error.name}: install the command with its engine, baton-cli[local]"
        ) from error

    quantization = Quantization(scheme, group_size=group_size, has_lm_head=lm_head)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        task = bar.add_task(f"reading {model.name}", total=1.0)

        def report(fraction: float, text: str) -> None:
            bar.update(task, completed=fraction, description=text)

        sizes = write_checkpoint(str(model), str(out), quantization, report)
    if as_json:
        document = {"path": str(out), "scheme": scheme, **asdict(sizes)}
        sys.stdout.write(json.dumps(document) + "\n")
        return
    share = sizes.quantized_bytes / sizes.plain_bytes
    experts = f" ({sizes.num_expert_layers} of them experts')" if sizes.num_expert_layers else ""
    console = Console(highlight=False)
    console.print(
        f"{sizes.num_layers} layers{experts} as {quantization.text}: "
        f"{sizes.plain_bytes / _MIB:,.1f} MiB of weights became "
        f"{sizes.quantized_bytes / _MIB:,.1f} MiB ({share:.0%})"
    )
    console.print(f"serve it with: baton up --model {out}", style="dim", markup=False)

"""The `baton` command: options and exit statuses; the work is in the modules beside."""

# typer makes options of arguments: their number and kind are the command line's.
# ruff: noqa: FBT002, PLR0913

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.completion import (  # type: ignore[attr-defined]
    completion_init,
    get_completion_script,
)

from baton.cli import ask
from baton.cli import demo as demo_command
from baton.cli.ask import Address, AsJson
from baton.cli.doctor import doctor
from baton.cli.examination import cluster_status
from baton.cli.models import DEMO_KV_BYTES, choose_models
from baton.cli.pins import print_pins
from baton.cli.plan import UpOptions
from baton.cli.quantize_command import quantize
from baton.cli.rundir import run_directory
from baton.cli.status import print_status, to_document
from baton.cli.target import scheduler_client
from baton.cli.trace_files import find_trace, read_spans
from baton.cli.up import run_detached, run_foreground, stop_system
from baton.cli.user_errors import UserError, explained
from baton.cli.waterfall import print_waterfall
from baton.cli.waterfall import to_document as trace_document

cache_app = typer.Typer(help="Keep prefixes in the cache.", no_args_is_help=True)
app = typer.Typer(
    name="baton",
    help="Serve language models with prefill and decode apart: start, ask, watch and trace.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")
completion_init()  # answers the shells; `baton completion` prints what asks


class Shell(Enum):
    """Shells that can complete commands."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command()
def up(
    prefill: Annotated[int, typer.Option(min=1, max=64, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode workers.")] = 1,
    model: Annotated[
        str, typer.Option(help="Directory of a Hugging Face model. Default: the demo model.")
    ] = "",
    name: Annotated[
        str, typer.Option(help="Name to serve it under. Default: the directory's.")
    ] = "",
    draft: Annotated[
        str,
        typer.Option(help="Draft model for speculation, or 'none'. Default: the demo pair's own."),
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background.")] = False,
    gateway: Annotated[bool, typer.Option(help="Serve the OpenAI-compatible HTTP API.")] = True,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the HTTP API; 0: a free one.")
    ] = 0,
    kv_bytes: Annotated[
        int | None, typer.Option(min=1, help="KV memory per worker. Default: from free memory.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    nats_url: Annotated[
        str, typer.Option(help="Use this broker instead of starting one; 'none' runs without.")
    ] = "",
    restart: Annotated[bool, typer.Option(help="Start crashed processes again.")] = True,
    start_timeout_s: Annotated[float, typer.Option(min=1.0, help="Longest wait.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Start a whole Baton on this machine: broker, tokenizer, cache, workers, scheduler, gateway.

    Cores are divided among the workers. Settings of single services come from the environment,
    such as BATON_PREFILL_MAX_NUM_BATCHED_TOKENS (see `python -m baton.prefill --help`).
    """
    console = Console(stderr=True)
    with explained(console):
        pair = choose_models(model, draft)
        options = UpOptions(
            model_path=str(pair.target),
            model_name=name or pair.name,
            draft_path=str(pair.draft or ""),
            num_prefill=prefill,
            num_decode=decode,
            gateway=gateway,
            http_port=http_port,
            kv_bytes=kv_bytes or (None if model else DEMO_KV_BYTES),
            dtype=dtype,
            nats_url=nats_url,
            can_restart=restart,
            start_timeout_s=start_timeout_s,
        )
        start = run_detached if detach else run_foreground
        exit_code = start(options, console, as_json=as_json)
    raise typer.Exit(exit_code)


@app.command()
def down(as_json: AsJson = False) -> None:
    """Stop the system that runs here, and make sure that nothing of it is left."""
    run = run_directory()
    was_running = run.is_locked()
    status = stop_system(run, Console(stderr=True))
    if as_json:
        sys.stdout.write(json.dumps({"was_running": was_running, "is_down": status == 0}) + "\n")
    raise typer.Exit(status)


@app.command()
def status(address: Address = "", as_json: AsJson = False) -> None:
    """Show every service, its state and load, and per worker the KV blocks by state."""
    with explained():
        found = cluster_status(address)
    if as_json:
        Console().print_json(data=to_document(found))
    else:
        print_status(Console(), found)


@cache_app.command()
def pin(
    prompt: Annotated[str, typer.Argument(help="The prefix, such as a system prompt.")],
    label: Annotated[str, typer.Option(help="Your name for it.")] = "",
    hours: Annotated[float, typer.Option(min=0.001, max=720.0, help="How long.")] = 24.0,
    address: Address = "",
) -> None:
    """Keep a prompt's KV from being evicted."""
    with scheduler_client(address) as client:
        print_pins(Console(), [client.pin_prefix(prompt, label=label, ttl_s=hours * 3600)])


@cache_app.command()
def unpin(pin_id: str, address: Address = "") -> None:
    """Take a pin back. Exit status 1 when there is none of that id."""
    with scheduler_client(address) as client:
        raise typer.Exit(0 if client.unpin_prefix(pin_id) else 1)


@cache_app.command()
def pins(address: Address = "") -> None:
    """List what is pinned."""
    with scheduler_client(address) as client:
        print_pins(Console(), client.pinned_prefixes())


@app.command(name="doctor")
def doctor_command(
    address: Address = "",
    probe_mib: Annotated[
        int, typer.Option(min=1, max=64, help="MiB to send between workers, to measure the path.")
    ] = 16,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a running system, and what to do. Exit status 1 on an error.

    Asks every process itself, compares versions, models and clocks, adds up KV blocks, looks for
    shared cores and leftover processes, and measures the paths between workers.
    """
    raise typer.Exit(doctor(Console(), address, probe_mib << 20, as_json=as_json))


@app.command()
def trace(
    wanted: Annotated[
        str, typer.Argument(metavar="[REQUEST_OR_TRACE_ID]", help="Default: the latest request.")
    ] = "",
    directory: Annotated[
        Path | None, typer.Option(help="Read traces from here instead of the local system's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a request's waterfall across all processes, from the local system's own trace files."""
    with explained():
        traces = directory or run_directory().traces
        spans = find_trace(read_spans(traces), wanted)
        if not spans:
            what = f"no trace of {wanted!r}" if wanted else "no request has been traced yet"
            hint = "make one with `baton generate`; spans are written within a second after its end"
            raise UserError(f"{what} in {traces}: {hint}")
    if as_json:
        Console().print_json(data=trace_document(spans), default=str)
    else:
        print_waterfall(Console(), spans)


@app.command(name="quantize")
def quantize_command(
    model: Annotated[Path, typer.Argument(help="Directory of a Hugging Face model.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; empty or new.")],
    scheme: Annotated[str, typer.Option(help="int8, int8-dynamic, int4 or fp8.")] = "int8",
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale, for int4: 32, 64 or 128.")
    ] = 64,
    lm_head: Annotated[bool, typer.Option(help="Quantize the output layer too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a smaller checkpoint of a model, which workers load like any other."""
    with explained():
        quantize(model, out, scheme, group_size=group_size, lm_head=lm_head, as_json=as_json)


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Start a system, stream a completion, show where its time went, and stop everything."""
    raise typer.Exit(demo_command.run(Console(stderr=as_json), as_json=as_json))


@app.command()
def completion(
    shell: Annotated[Shell, typer.Argument(help="Which shell.", show_choices=True)],
) -> None:
    """Print what makes a shell complete this command.

    bash: [bold]source <(baton completion bash)[/] in ~/.bashrc;
    zsh: the same in ~/.zshrc, after compinit;
    fish: [bold]baton completion fish > ~/.config/fish/completions/baton.fish[/].
    """
    script = get_completion_script(
        prog_name="baton", complete_var="_BATON_COMPLETE", shell=shell.value
    )
    sys.stdout.write(f"{script}\n")


app.command(name="generate", epilog=ask.GENERATE_EXAMPLES)(ask.generate_command)
app.command(name="chat", epilog=ask.CHAT_EXAMPLES)(ask.chat_command)
app.command(name="bench", epilog=ask.BENCH_EXAMPLES)(ask.bench_command)


if __name__ == "__main__":
    app()

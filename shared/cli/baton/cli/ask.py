"""The commands that ask a running system something: generate, chat and bench."""

# typer makes options of arguments: their number and kind are the command line's.
# ruff: noqa: FBT002, PLR0913

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from baton.cli.bench import Plan, bench
from baton.cli.chat import Chat
from baton.cli.failures import explained
from baton.cli.generate import generate
from baton.cli.measurement import Target
from baton.cli.options import (
    Address,
    AsJson,
    Choice,
    Grammar,
    JsonSchema,
    MaxTokens,
    MinP,
    ModelName,
    Regex,
    Seed,
    Speculation,
    Stop,
    Temperature,
    TopK,
    TopP,
    make_guide,
)
from baton.cli.rundir import run_directory
from baton.cli.target import scheduler_address
from baton.client import Client, GenerateOptions

GENERATE_EXAMPLES = (
    'Examples: [bold]baton generate "def main():" --explain[/] shows where the time went;'
    " [bold]baton generate - < prompt.txt[/] reads a file;"
    ' [bold]baton generate "Is this Python? " --choice yes --choice no[/] holds the answer to one'
    ' of two texts; [bold]baton generate "A person: " --json-schema person.json --json[/] prints'
    " everything as JSON."
)
CHAT_EXAMPLES = (
    'Example: [bold]baton chat --system "Answer in one sentence." --temperature 0.7[/].'
    " Ctrl-C stops an answer, /quit or Ctrl-D ends the conversation."
)
BENCH_EXAMPLES = (
    "Examples: [bold]baton bench --requests 200 --concurrency 8[/] keeps eight requests running;"
    " [bold]baton bench --rate 4 --duration-s 30[/] sends four a second, whether or not the system"
    " keeps up; [bold]baton bench --json > result.json[/] keeps the figures."
)
TimeoutS = Annotated[float, typer.Option(min=0.1, help="Deadline of one request.")]


def generate_command(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = "",
    regex: Regex = "",
    grammar: Grammar = None,
    choice: Choice = None,
    speculation: Speculation = None,
    model: ModelName = "",
    explain: Annotated[bool, typer.Option(help="Show where the time went.")] = False,
    timeout_s: TimeoutS = 600.0,
    address: Address = "",
    as_json: AsJson = False,
) -> None:
    """Stream one completion."""
    options = GenerateOptions(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop,
        speculation=speculation,
        guide=make_guide(json_schema, regex, grammar, choice),
        explain=explain,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with explained(Console(stderr=True)):
        target = scheduler_address(address, run_directory())
        with Client(target, timeout_s=timeout_s) as client:
            generate(client, Console(), text, options, as_json=as_json)


def chat_command(
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    speculation: Speculation = None,
    model: ModelName = "",
    timeout_s: TimeoutS = 600.0,
    address: Address = "",
) -> None:
    """Talk to a model that has a chat template; /help lists what can be typed there."""
    options = GenerateOptions(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        speculation=speculation,
    )
    with (
        explained(Console(stderr=True)),
        Client(scheduler_address(address, run_directory()), timeout_s=timeout_s) as client,
    ):
        Chat(client, Console(), options, system).run()


def bench_command(
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Most requests.")] = 64,
    duration_s: Annotated[
        float, typer.Option(min=0.1, max=86_400.0, help="No request starts later than this.")
    ] = 60.0,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, max=1024, help="Requests at a time.")
    ] = 4,
    rate: Annotated[
        float,
        typer.Option(min=0.0, max=10_000.0, help="Arrivals per second instead, at random times."),
    ] = 0.0,
    prompt_words: Annotated[int, typer.Option(min=1, max=100_000, help="Of a prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to produce, each time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and arrivals.")] = 1,
    ttft_target_ms: Annotated[
        float, typer.Option(min=0.0, help="A good request's most time to its first token.")
    ] = 1000.0,
    tpot_target_ms: Annotated[
        float, typer.Option(min=0.0, help="A good request's most time per token after it.")
    ] = 100.0,
    speculation: Speculation = None,
    model: ModelName = "",
    timeout_s: TimeoutS = 300.0,
    address: Address = "",
    as_json: AsJson = False,
) -> None:
    """Load a running system and measure it as a client does: TTFT, TPOT, goodput."""
    options = GenerateOptions(
        model=model,
        max_tokens=max_tokens,
        temperature=0.0,
        seed=seed,
        ignore_eos=True,
        speculation=speculation,
    )
    plan = Plan(
        num_requests=requests,
        duration_s=duration_s,
        concurrency=concurrency,
        rate=rate,
        num_prompt_words=prompt_words,
        seed=seed,
        options=options,
        target=Target(ttft_target_ms / 1e3, tpot_target_ms / 1e3),
        timeout_s=timeout_s,
    )
    with explained(Console(stderr=True)):
        target = scheduler_address(address, run_directory())
        raise typer.Exit(bench(target, plan, Console(), as_json=as_json))

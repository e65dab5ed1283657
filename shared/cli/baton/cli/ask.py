"""The commands that ask a running system: generate, chat and bench, with their options."""

# typer makes options of arguments: their number and kind are the command line's.
# ruff: noqa: FBT002, PLR0913

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from baton.cli.bench import LoadPlan, bench
from baton.cli.chat import Conversation
from baton.cli.generate import generate
from baton.cli.measurement import LatencyTarget
from baton.cli.target import ADDRESS_VARIABLE, scheduler_address, scheduler_client
from baton.cli.user_errors import explained
from baton.client import GenerateOptions, Guide

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
Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        help="Scheduler, HOST:PORT. Default: the system that runs here.",
        envvar=ADDRESS_VARIABLE,
        show_envvar=True,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelName = Annotated[str, typer.Option("--model", help="Model name, where several are served.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to produce.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Keep only the k most likely; 0 keeps all.")]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Keep the fewest that reach probability p.")
]
MinP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Drop those below p times the likeliest.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same text.")]
Speculation = Annotated[
    bool | None,
    typer.Option("--speculation/--no-speculation", help="Draft tokens ahead, or do not."),
]
TimeoutS = Annotated[float, typer.Option(min=0.1, help="Deadline of one request.")]


def generate_command(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End at this text; may be repeated.")
    ] = None,
    json_schema: Annotated[
        str, typer.Option(help="Output must fulfil this JSON schema: a file, or JSON itself.")
    ] = "",
    regex: Annotated[str, typer.Option(help="Output must match this regular expression.")] = "",
    grammar: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Output must follow this file's Lark grammar."
        ),
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="Output must be one of these; repeat it for each.")
    ] = None,
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
        return_token_ids=as_json,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with scheduler_client(address, timeout_s) as client:
        generate(client, Console(), text, options, as_json=as_json)


def chat_command(
    system: Annotated[str, typer.Option(help="Instructions that come before the talk.")] = "",
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
    with scheduler_client(address, timeout_s) as client:
        conversation = Conversation(client, Console(), options, system)
        conversation.check()
        conversation.run()


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
    plan = LoadPlan(
        num_requests=requests,
        duration_s=duration_s,
        concurrency=concurrency,
        rate=rate,
        num_prompt_words=prompt_words,
        seed=seed,
        options=GenerateOptions(
            model=model,
            max_tokens=max_tokens,
            temperature=0.0,
            seed=seed,
            ignore_eos=True,
            speculation=speculation,
        ),
        target=LatencyTarget(ttft_target_ms / 1e3, tpot_target_ms / 1e3),
        timeout_s=timeout_s,
    )
    with explained():
        raise typer.Exit(bench(scheduler_address(address), plan, Console(), as_json=as_json))


def make_guide(
    json_schema: str, regex: str, grammar: Path | None, choice: Sequence[str] | None
) -> Guide | None:
    """What the output must match, None for anything.

    Raises:
        typer.BadParameter: more than one was given, or the schema is not JSON.
    """
    options = {
        "--json-schema": json_schema,
        "--regex": regex,
        "--grammar": grammar,
        "--choice": choice,
    }
    given = [name for name, value in options.items() if value]
    if len(given) > 1:
        raise typer.BadParameter(f"give only one of {', '.join(given)}")
    if json_schema:
        return Guide.json_schema(_read_schema(json_schema))
    if regex:
        return Guide.regex(regex)
    if grammar is not None:
        return Guide.lark(grammar.read_text(encoding="utf-8"))
    return Guide.choice(choice) if choice else None


def _read_schema(given: str) -> dict[str, object]:
    try:
        is_text = given.lstrip().startswith("{")
        schema = json.loads(given if is_text else Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"--json-schema is neither a JSON file nor JSON: {error}"
        ) from None
    if not isinstance(schema, dict):
        raise typer.BadParameter("--json-schema must be a JSON object")
    return schema

"""`baton demo`: the whole relay once, with figures, and nothing left behind."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from baton.cli.generate import stream_to
from baton.cli.leftovers import living
from baton.cli.models import DEMO_KV_BYTES, demo_pair
from baton.cli.plan import UpOptions
from baton.cli.rundir import RunDirectory
from baton.cli.stages import print_stages, sum_stages
from baton.cli.supervisor import StopRequested
from baton.cli.up import interruptible, local_system, new_run_id, stop_on_signals
from baton.cli.up_output import ProgressDisplay
from baton.cli.user_errors import UserError
from baton.client import BatonError, Client, Completion
from baton.core.roles import Role
from baton.core.stages import StageName

MAX_GAP_PCT = 5.0
_PROMPT_CHARS = 2600
"""About 850 tokens of Python, so that the prefill can be seen."""
_MAX_TOKENS = 96
_TIMEOUT_S = 60.0
_NEEDED_STAGES = (
    *(StageName.TOKENIZE, StageName.ADMIT, StageName.QUEUE, StageName.PREFILL),
    *(StageName.HANDOFF, StageName.FIRST_DECODE, StageName.DECODE),
)


class DemoFailed(UserError):
    """The demo did not show what it should."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The figures of the last line."""

    num_tokens: int
    ttft_ms: float
    stages_ms: float
    gap_pct: float

    def line(self) -> str:
        """The last line of a demo that went well."""
        return (
            f"demo ok tokens={self.num_tokens} ttft_ms={self.ttft_ms:.1f}"
            f" stages_ms={self.stages_ms:.1f} gap_pct={self.gap_pct:.2f}"
        )


def run(console: Console, *, as_json: bool = False) -> int:
    """Runs the demo; the last line says how it went, the exit status too.

    With `as_json` the figures of a demo that went well go to standard output as JSON.
    """
    started_at_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="baton-demo-") as directory:
            result = _run_in(RunDirectory(Path(directory)), console)
    except (UserError, OSError) as error:
        return _fail(console, str(error))
    except BatonError as error:
        return _fail(console, f"{error.reason.name.lower()}: {error.message}")
    except (StopRequested, KeyboardInterrupt):
        return _fail(console, "interrupted; everything was stopped")
    console.print(f"took {time.monotonic() - started_at_s:.1f} s", style="dim", highlight=False)
    console.print(result.line(), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
    return 0


def demo_prompt() -> str:
    """The beginning of a standard library module: the demo model was trained on Python like it."""
    source = inspect.getsource(shlex)[:_PROMPT_CHARS]
    return source[: source.rindex("return") + len("return")]


def _run_in(run_dir: RunDirectory, console: Console) -> DemoResult:
    pair = demo_pair()
    options = UpOptions(
        model_path=str(pair.target),
        model_name=pair.name,
        draft_path=str(pair.draft or ""),
        gateway=False,
        kv_bytes=DEMO_KV_BYTES,
        can_restart=False,
        drain_grace_s=2.0,
        start_timeout_s=120.0,
        settings={"BATON_SCHEDULER_FORCE_DISAGGREGATION": "true"},
    )
    console.print(f"starting Baton with {pair.name} (one prefill and one decode worker)")
    with (
        stop_on_signals() as stop,
        ProgressDisplay(console) as display,
        local_system(options, run_dir, new_run_id(), stop, display.show) as supervisor,
    ):
        display.stop()
        state = supervisor.state
        scheduler = state.process(Role.SCHEDULER)
        if scheduler is None:
            raise DemoFailed("there is no scheduler")
        with interruptible(), Client(scheduler.address, timeout_s=_TIMEOUT_S) as client:
            completion = _complete(client, console)
    if survivors := living(state):
        raise DemoFailed(f"processes {survivors} are left")
    console.print("\neverything has stopped; no process is left", style="dim")
    return check(completion)


def _complete(client: Client, console: Console) -> Completion:
    """One request to warm up (other text, so that nothing is cached), then the one that counts."""
    prompt = demo_prompt()
    warm_up = client.generate(
        prompt[::-1], stream=True, max_tokens=8, temperature=0.0, ignore_eos=True, explain=True
    )
    with warm_up:
        for _ in warm_up:
            pass
    console.rule("prompt, and its completion", style="dim")
    console.print(prompt[-200:], style="dim", markup=False, highlight=False, end="")
    completion = stream_to(
        console,
        client.generate(
            prompt,
            stream=True,
            max_tokens=_MAX_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            explain=True,
        ),
    )
    console.print()
    console.rule("where the time went", style="dim")
    print_stages(console, completion)
    return completion


def check(completion: Completion) -> DemoResult:
    """The result of a completion.

    Raises:
        DemoFailed: it is not what the demo promises.
    """
    total = sum_stages(completion)
    num_tokens = completion.usage.completion_tokens
    placement = completion.placement
    if placement is None or placement.local_prefill:
        raise DemoFailed("the prompt was not computed by a prefill worker")
    seen = {stage.name for stage in completion.stages}
    if missing := [name for name in _NEEDED_STAGES if name not in seen]:
        raise DemoFailed(f"stages {', '.join(missing)} are missing from the breakdown")
    if not num_tokens or not completion.text:
        raise DemoFailed("no text was generated")
    if total.gap_pct > MAX_GAP_PCT:
        raise DemoFailed(
            f"the stages add up to {total.stages_ms:.1f} ms, the client saw {total.ttft_ms:.1f} ms:"
            f" a gap of {total.gap_pct:.2f} %, more than {MAX_GAP_PCT:g} %"
        )
    return DemoResult(num_tokens, total.ttft_ms, total.stages_ms, total.gap_pct)


def _fail(console: Console, why: str) -> int:
    console.print(f"\ndemo failed: {why}", markup=False, highlight=False, soft_wrap=True)
    return 1

"""Which files and functions one request runs through, in every process, in order.

    python -m benchmarks.request_path --json                     # this tree
    python -m benchmarks.request_path --tree ../other --json     # another checkout with its .venv

Starts the whole system with the demo model, sends one streamed chat-free completion over HTTP
without optional features, and notes every function of Baton that ran. What also runs while the
system is idle (announcements, housekeeping) is left out. Lines are those of the functions: what a
person reads to follow the request.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

HOOK = Path(__file__).parent / "hook"
_IDLE_S = 6.0
_SETTLE_S = 1.0
_DUMP_TIMEOUT_S = 20.0
_ROLES = ("gateway", "tokenizer", "scheduler", "prefill", "decode", "cache")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tree", type=Path, default=Path.cwd(), help="checkout to trace")
    parser.add_argument("--list", action="store_true", help="print every function in order")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


def start(tree: Path, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Starts the system; returns its environment and what `baton up --json` says."""
    env = {
        **os.environ,
        "PYTHONPATH": str(HOOK),
        "BATON_REQUEST_PATH": str(folder),
        "BATON_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [tree / ".venv/bin/baton", "up", "--detach", "--draft", "none", "--json"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the system did not start:\n{done.stdout}{done.stderr}")
    return env, json.loads(done.stdout.strip().splitlines()[-1])


def complete(url: str, prompt: str) -> int:
    """Streams one completion over HTTP; returns the number of server-sent chunks."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return sum(line.startswith(b"data:") for line in response)


def window(folder: Path, name: str, pids: set[int], work: Any) -> dict[int, Any]:
    """Runs `work` while every process takes notes; returns the notes by process id."""
    flag = folder / f"on.{name}"
    flag.touch()
    time.sleep(0.2)
    work()
    flag.unlink()
    ends_at_s = time.monotonic() + _DUMP_TIMEOUT_S
    while time.monotonic() < ends_at_s:
        found = {int(path.name.split(".")[1]): path for path in folder.glob(f"{name}.*.json")}
        if pids <= set(found):
            break
        time.sleep(0.1)
    return {pid: json.loads(path.read_text("utf-8")) for pid, path in found.items() if pid in pids}


def role_of(argv: list[str]) -> str:
    """The role of a process by its command line; empty for what serves no request."""
    return next((role for role in _ROLES if f"baton.{role}" in argv), "")


def trace(tree: Path, folder: Path) -> list[tuple[str, str, str, int, int]]:
    """(role, file, function, first line, last line) of what one request alone ran."""
    env, system = start(tree, folder)
    try:
        url = str(system["http"]).removesuffix("/v1")
        complete(url, "import sys\n")  # connections, lazily made objects
        time.sleep(_SETTLE_S)
        pids = _pids(folder)
        idle = window(folder, "idle", pids, lambda: time.sleep(_IDLE_S))
        prompt = "def quicksort(items):\n    " + "# sorts a list\n    " * 40
        busy = window(folder, "busy", pids, lambda: (complete(url, prompt), time.sleep(_SETTLE_S)))
    finally:
        subprocess.run([tree / ".venv/bin/baton", "down"], cwd=tree, env=env, check=False,
                       capture_output=True)  # fmt: skip
    rows = []
    for pid, notes in busy.items():
        known = {tuple(row) for row in idle.get(pid, {"rows": []})["rows"]}
        role = role_of(notes["argv"])
        rows += [
            (role, os.path.relpath(file, tree), name, first, last)
            for file, name, first, last in notes["rows"]
            if role and (file, name, first, last) not in known
        ]
    return rows


def _pids(folder: Path) -> set[int]:
    """Processes that take notes and serve: those of the roles."""
    pids = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            argv = (path / "cmdline").read_text("utf-8").split("\0")
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        if role_of(argv) and f"BATON_REQUEST_PATH={folder}".encode() in environment:
            pids.add(int(path.name))
    return pids


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    options = parse(argv)
    tree = options.tree.resolve()
    with tempfile.TemporaryDirectory() as folder:
        rows = trace(tree, Path(folder))
    say = sys.stdout.write
    if options.list:
        for role, file, name, first, last in rows:
            say(f"{role:<10} {file}:{first}-{last} {name}\n")
    lines: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    for _, file, _, first, last in rows:
        lines[file][first, last] = last - first + 1
    covered = {file: len({n for a, b in spans for n in range(a, b + 1)})
               for file, spans in lines.items()}  # fmt: skip
    whole = {file: len((tree / file).read_text("utf-8").splitlines()) for file in covered}
    for file in sorted(covered, key=lambda name: -covered[name]):
        say(f"{covered[file]:>6} of {whole[file]:>4}  {file}\n")
    result = {
        "files": len(covered),
        "functions": len({row[1:] for row in rows}),
        "lines_of_functions": sum(covered.values()),
        "lines_of_files": sum(whole.values()),
        "processes": len({row[0] for row in rows}),
    }
    for key, value in result.items():
        say(f"{key:<20} {value}\n")
    if options.json:
        say(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

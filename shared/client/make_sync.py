"""Generate the blocking SDK from the asyncio one.

Run `make sync` after editing a source; `tests/meta/test_sync_client.py` fails when a file is stale.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import MappingProxyType

from unasync import Rule, unasync_files  # type: ignore[import-untyped]

SHARED = Path(__file__).resolve().parent.parent
FILES = MappingProxyType({
    "wire/baton/wire/inference/caller.py": "wire/baton/wire/inference/blocking.py",
    "client/baton/client/async_stream.py": "client/baton/client/sync_stream.py",
    "client/baton/client/async_client.py": "client/baton/client/sync_client.py",
})
"""Generated files by their sources, below shared/."""
# Text that is replaced before the tokens are: what no single name says.
_BEFORE = (
    (r"    # async only: begin\n.*?# async only: end\n", ""),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\bAwaitable, ", ""),
    (r"\bgrpc\.aio\b", "grpc"),
    (r"\.close\(None\)", ".close()"),
    (r"baton\.wire\.inference\.caller\b", "baton.wire.inference.blocking"),
    (r"client\.async_stream\b", "client.sync_stream"),
    (
        r'\A""".*?"""',
        '# Generated from `{source}`: edit that, then `make sync`.\n"""{title}"""',
    ),
)
_TITLES = MappingProxyType({
    "blocking.py": "Calls to a scheduler's InferenceService on blocking gRPC, for the SDK.",
    "sync_stream.py": "A streamed answer on blocking gRPC.",
    "sync_client.py": "The blocking client: usable from any thread, without an event loop.",
})
_NAMES = MappingProxyType({
    "aiter": "iter",
    "anext": "next",
    "aclose": "close",
    "AsyncChunkCall": "ChunkCall",
    "AsyncClient": "Client",
    "AsyncInferenceCaller": "InferenceCaller",
    "AsyncPause": "Pause",
    "AsyncTextStream": "TextStream",
    "OpenAsyncCall": "OpenCall",
})
# In docstrings, which unasync leaves alone.
_DOCS = (
    ("async with AsyncClient", "with Client"),
    ("async with client", "with client"),
    ("async for chunk", "for chunk"),
    ("`async with`", "`with`"),
    ("`async for`", "`for`"),
    (" `await` on it is allowed and\n    returns it unchanged.", ""),
    ("scheduler from one event loop; close", "scheduler. Thread-safe; close"),
    ("For the task that iterates.", "For the thread that iterates."),
    ("from another task of the loop:", "from any thread:"),
    (", not when awaited", ""),
    (", on that call's event loop", ""),
)


def generate(source: Path, target: Path) -> str:
    """The text of the blocking file of a source; `target` is where it will lie."""
    text = source.read_text(encoding="utf-8")
    title = _TITLES[target.name]
    for pattern, replacement in _BEFORE:
        filled = replacement.replace("{title}", title).replace("{source}", source.name)
        text = re.sub(pattern, filled, text, count=0, flags=re.DOTALL | re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "_async" / "file.py", Path(folder) / "_sync" / "file.py"
        before.parent.mkdir()
        before.write_text(text, encoding="utf-8")
        unasync_files([str(before)], [Rule("/_async/", "/_sync/", dict(_NAMES))])
        text = after.read_text(encoding="utf-8")
    for old, new in _DOCS:
        text = text.replace(old, new)
    text = _ruff(text, target, "check", "--fix", "--unsafe-fixes", "--exit-zero", "--quiet")
    return _ruff(text, target, "format", "--quiet")


def _ruff(text: str, target: Path, *command: str) -> str:
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run(
        [ruff, *command, "--stdin-filename", target, "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def main() -> int:
    """Entry point; with `--check`, returns 1 when a file is stale and writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    is_check = parser.parse_args().check
    stale = []
    for source, name in FILES.items():
        target = SHARED / name
        text = generate(SHARED / source, target)
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not is_check:
                target.write_text(text, encoding="utf-8")
    if is_check and stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run `make sync`\n")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

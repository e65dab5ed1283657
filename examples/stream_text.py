"""Streams a completion, then tells what it used: `python examples/stream_text.py HOST:PORT PROMPT`.

The address is the scheduler's; `baton status` shows it.
"""

from __future__ import annotations

import sys

from baton.client import BatonError, Client


def main(address: str, prompt: str) -> int:
    """Returns the exit status."""
    with Client(address, timeout_s=60.0) as client:
        try:
            with client.generate(prompt, stream=True, max_tokens=64, seed=7) as stream:
                for chunk in stream:  # leaving the block early cancels the request everywhere
                    print(chunk.text, end="", flush=True)
        except BatonError as error:
            print(f"{error.reason.name}: {error.message}", file=sys.stderr)
            return 1
    usage = stream.completion.usage
    print(f"\n{usage.prompt_tokens} + {usage.completion_tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

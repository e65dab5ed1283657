"""Asks several questions at once: `python examples/ask_many.py HOST:PORT QUESTION...`.

The address is the scheduler's; the model needs a chat template.
"""

from __future__ import annotations

import asyncio
import sys

from baton.client import AsyncClient


async def main(address: str, questions: list[str]) -> None:
    """Prints the answers in the order of the questions."""
    async with AsyncClient(address, timeout_s=60.0) as client:
        answers = await asyncio.gather(
            *(
                client.chat([{"role": "user", "content": question}], max_tokens=64)
                for question in questions
            )
        )
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n  {answer.text}  ({answer.finish_reason}, {answer.elapsed_s:.2f} s)")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))

"""What reaches a terminal: text of models, labels of callers, and the prompt of a chat."""

from __future__ import annotations

import builtins
import io
import sys
from typing import cast

import pytest
from rich.console import Console

from baton.cli.chat import Conversation
from baton.cli.generate import write
from baton.cli.pins import print_pins
from baton.client import Client, PinnedPrefix


@pytest.mark.parametrize(
    ("is_terminal", "expected"), [(True, "a\tb\n␛]52;c;x␇ \\x9b31m␡␍"), (False, None)]
)
def test_control_characters_of_a_model_do_not_act_on_a_terminal(
    is_terminal: bool, expected: str | None
) -> None:
    text = "a\tb\n\x1b]52;c;x\x07 \x9b31m\x7f\r"
    console = Console(file=io.StringIO(), force_terminal=is_terminal)
    write(console, text)
    assert cast("io.StringIO", console.file).getvalue() == (expected or text)


@pytest.mark.parametrize("label", ["[/sys]", "[red]", "plain"])
def test_a_label_in_brackets_is_shown_as_it_is(label: str) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_pins(console, [PinnedPrefix("id", label, 3, 2, 1 << 20, 3600.0)])
    assert label in cast("io.StringIO", console.file).getvalue()


def test_readline_knows_the_prompt_of_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []

    def ask(prompt: str = "") -> str:
        prompts.append(prompt)
        raise EOFError

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    console = Console(file=io.StringIO(), force_terminal=True)
    Conversation(cast("Client", None), console, {}).run()
    [prompt] = prompts
    assert prompt.replace("\x01\033[1m\x02", "").replace("\x01\033[0m\x02", "") == "you> "
    assert "you>" not in cast("io.StringIO", console.file).getvalue()

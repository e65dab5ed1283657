"""`baton chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress

from rich.console import Console

from baton.cli.generate import Interrupted, stream_to, write
from baton.cli.stages import print_stages
from baton.cli.user_errors import described
from baton.client import BatonError, Client, Completion, GenerateOptions

_HELP = """\
/stats  where the last answer's time went
/reset  forget the conversation
/help   this list
/quit   end; Ctrl-D does the same
Ctrl-C  stop the answer that is being written"""


class Conversation:
    """A conversation until /quit or end of input; an answer that fails does not end it."""

    def __init__(
        self, client: Client, console: Console, options: GenerateOptions, system: str = ""
    ) -> None:
        self._client = client
        self._console = console
        self._options = options
        self._system = system
        self._messages: list[Mapping[str, str]] = []
        self._last: Completion | None = None
        self._reset()

    def check(self) -> None:
        """Finds out whether the model can hold this conversation.

        Raises:
            BatonError: it cannot, such as a model without a chat template.
        """
        messages = [*self._messages, {"role": "user", "content": "Hello"}]
        self._client.tokenize(messages=messages, model=self._options.get("model", ""))

    def run(self) -> None:
        """Reads lines and answers them."""
        self._console.print("/help lists what can be typed here", style="dim")
        _turn_on_line_editing()
        while True:
            try:
                line = self._read_line().strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line == "/quit":
                return
            self._take(line)

    def _read_line(self) -> str:
        if not (self._console.is_terminal and sys.stdin.isatty()):
            return self._console.input("[bold]you>[/] ")
        # readline must know the prompt, or it draws a line of the history over it; \x01 and \x02
        # enclose what takes no room.
        return input("\x01\033[1m\x02you>\x01\033[0m\x02 ")

    def _take(self, line: str) -> None:
        match line:
            case "":
                pass
            case "/reset":
                self._reset()
                self._console.print("the conversation is forgotten", style="dim")
            case "/stats" if self._last and self._last.stages:
                print_stages(self._console, self._last)
            case "/stats":
                self._console.print("no whole answer yet", style="dim")
            case command if command.startswith("/"):
                self._console.print(_HELP, style="dim", highlight=False)
            case _:
                self._answer(line)

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _answer(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        options: GenerateOptions = {**self._options, "messages": messages, "explain": True}
        try:
            completion = stream_to(self._console, self._client.generate(stream=True, **options))
        except Interrupted as interrupted:
            completion = interrupted.completion
            write(self._console, " …")
        except BatonError as error:
            self._console.print(described(error), style="red", markup=False, highlight=False)
            return  # as if the line had not been written
        write(self._console, "\n")
        self._last = completion
        self._messages = [*messages, {"role": "assistant", "content": completion.text}]


def _turn_on_line_editing() -> None:
    """Arrow keys and a history of lines, where the platform has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - importing it is what turns it on

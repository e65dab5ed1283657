"""Finds tool calls in a model's text while it comes, in the formats that chat templates teach.

- Hermes, Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them;
- Llama 3: `{"name": ..., "parameters": {...}}` as the whole answer, or after `<|python_tag|>`,
  several separated by `;`;
- Mistral: `[TOOL_CALLS]` and an array of such objects, or `[TOOL_CALLS]name{...}`; without the
  marker, which is a special token and may not be in the text, an array as the whole answer.

What it finds does not depend on the pieces in which the text comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from baton.gateway.call_scan import CallScanner

HERMES, HERMES_END, LLAMA, MISTRAL = "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]"
_MARKERS = (HERMES, LLAMA, MISTRAL)
_ANY_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))
_MISTRAL_HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*")
_MAX_MISTRAL_HEAD_CHARS = 200
_MAX_MARKER_CHARS = max(map(len, _MARKERS))
_SEPARATORS = " \t\r\n;,"
"""Between the calls of one answer."""


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is not part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call was found; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of a call's arguments, as JSON text."""

    index: int
    text: str


Found = Content | CallBegins | Arguments


class Reader(Protocol):
    """Splits one answer's text into content and calls."""

    def feed(self, text: str) -> list[Found]:
        """What became certain with this text."""

    def finish(self) -> list[Found]:
        """What was held back: nothing follows."""


class NamedReader:
    """For an answer that is nothing but the arguments of one tool: it was forced to be."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Found]:
        """See Reader."""
        if not text:
            return []
        begins: list[Found] = [] if self._has_begun else [CallBegins(0, self._name)]
        self._has_begun = True
        return [*begins, Arguments(0, text)]

    def finish(self) -> list[Found]:
        """See Reader."""
        return []


class CallReader:
    """For an answer that may hold calls of the tools with these names.

    `max_calls` drops those that come after.
    """

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        self._names = names
        self._max_calls = max_calls
        self._num_calls = 0
        self._buffer = ""
        self._spaces = ""
        """White space held back: before a call it is dropped."""
        self._opening = ""
        """What stands before a call that is not certain yet; content if it becomes none."""
        self._is_strict = False
        """Without a marker, only a call of a known tool is one."""
        self._is_array = False
        self._scanner = CallScanner()
        self._has_begun = False
        self._state: Callable[[], bool] = self._at_start
        self._found: list[Found] = []

    def feed(self, text: str) -> list[Found]:
        """See Reader."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._take_found()

    def finish(self) -> list[Found]:
        """See Reader."""
        if self._state != self._after_call:
            raw = self._scanner.raw if self._state == self._in_call and not self._has_begun else ""
            self._say(self._opening + raw + self._buffer)
        self._buffer = self._opening = ""
        if self._spaces and not self._num_calls:
            self._found.append(Content(self._spaces))
        return self._take_found()

    # Each state takes what it can from the buffer, and returns False when it needs more text.

    def _at_start(self) -> bool:
        self._say(self._take_spaces())
        self._is_strict = True
        if self._buffer.startswith("{"):
            return self._begin(CallScanner(self._names))
        if self._buffer.startswith("["):
            inner = self._buffer[1:].lstrip()
            if inner.startswith("{"):
                return self._begin_array()
            if not inner:
                return False
        elif not self._buffer:
            return False
        return self._go_on(self._in_content)

    def _in_content(self) -> bool:
        marker = _ANY_MARKER.search(self._buffer)
        if marker is None:
            kept = len(self._buffer) - _partial_marker_chars(self._buffer)
            self._say(self._buffer[:kept])
            self._buffer = self._buffer[kept:]
            return False
        self._say(self._buffer[: marker.start()])
        self._buffer = self._buffer[marker.end() :]
        self._opening = marker.group()
        self._is_strict = self._is_array = False
        return self._go_on(self._after_marker)

    def _after_marker(self) -> bool:
        marker, text = self._opening, self._buffer.lstrip()
        if text.startswith("{"):
            self._opening += self._take_spaces()
            return self._begin(CallScanner())
        if not text:
            return False
        if marker != MISTRAL:
            return self._is_no_call(marker)
        inner = text.removeprefix("[").lstrip()
        if not text.startswith("["):
            return self._after_mistral()
        if inner.startswith("{"):
            return self._begin_array()
        return self._is_no_call(marker) if inner else False

    def _after_mistral(self) -> bool:
        """At the name of a tool, which its arguments follow."""
        brace = self._buffer.find("{")
        if brace < 0 and len(self._buffer) <= _MAX_MISTRAL_HEAD_CHARS:
            return False
        head = _MISTRAL_HEAD.fullmatch(self._buffer, 0, max(brace, 0))
        if brace > _MAX_MISTRAL_HEAD_CHARS or head is None:
            return self._is_no_call(self._opening)
        self._buffer = self._buffer[brace:]
        return self._begin(CallScanner.of_arguments(head[1]))

    def _in_call(self) -> bool:
        scanner = self._scanner
        self._buffer = self._buffer[scanner.feed(self._buffer) :]
        if scanner.is_rejected:
            return self._is_no_call(self._opening + scanner.raw)
        if scanner.is_call:
            self._tell(scanner)
        return scanner.is_done and self._go_on(self._after_call)

    def _after_call(self) -> bool:
        self._buffer = self._buffer.lstrip(_SEPARATORS)
        if self._buffer.startswith("{"):
            return self._begin(CallScanner(self._names if self._is_strict else None))
        if self._is_array and self._buffer:
            self._is_array = False
            self._buffer = self._buffer.removeprefix("]")
            return True
        if len(self._buffer) < len(HERMES_END) and HERMES_END.startswith(self._buffer):
            return False
        self._buffer = self._buffer.removeprefix(HERMES_END)
        return self._go_on(self._in_gap)

    def _in_gap(self) -> bool:
        self._buffer = self._buffer.lstrip()
        return bool(self._buffer) and self._go_on(self._in_content)

    def _go_on(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _begin(self, scanner: CallScanner) -> bool:
        self._scanner = scanner
        self._has_begun = False
        return self._go_on(self._in_call)

    def _begin_array(self) -> bool:
        brace = self._buffer.index("{")
        self._opening += self._buffer[:brace]
        self._buffer = self._buffer[brace:]
        self._is_array = True
        return self._begin(CallScanner(self._names if self._is_strict else None))

    def _is_no_call(self, text: str) -> bool:
        self._opening = ""
        if self._is_strict:
            self._buffer = text + self._buffer  # there may be a marker in it
        else:
            self._say(text)
        return self._go_on(self._in_content)

    def _tell(self, scanner: CallScanner) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._num_calls += 1
            self._opening = self._spaces = ""
            self._find(CallBegins(self._num_calls - 1, scanner.name or ""))
        text = scanner.take_arguments()
        if text:
            self._find(Arguments(self._num_calls - 1, text))

    def _find(self, found: CallBegins | Arguments) -> None:
        if self._max_calls is None or found.index < self._max_calls:
            self._found.append(found)

    def _say(self, text: str) -> None:
        whole = self._spaces + text
        kept = whole.rstrip()
        self._spaces = whole[len(kept) :]
        if kept:
            self._found.append(Content(kept))

    def _take_spaces(self) -> str:
        rest = self._buffer.lstrip()
        spaces = self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest
        return spaces

    def _take_found(self) -> list[Found]:
        found, self._found = self._found, []
        return found


def _partial_marker_chars(text: str) -> int:
    """How many of the last characters may be the beginning of a marker."""
    for length in range(min(len(text), _MAX_MARKER_CHARS - 1), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in _MARKERS):
            return length
    return 0

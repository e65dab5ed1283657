"""Finds tool calls in a model's text as it streams in, in the formats that chat templates teach.

- Hermes, Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them;
- Llama 3: `{"name": ..., "parameters": {...}}` as the whole answer, or after `<|python_tag|>`,
  several separated by `;`;
- Mistral: `[TOOL_CALLS]` and an array of such objects, or `[TOOL_CALLS]name{...}`; also an array
  as the whole answer, because the marker is a special token that the text may lack.

The result does not depend on how the text is cut into pieces, and the work is linear in the text:
the model, and so its prompt's author, chooses what the parser reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from baton.core.toolcalls.json_scan import ToolCallScanner

HERMES, HERMES_END, LLAMA, MISTRAL = "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]"
_MARKERS = (HERMES, LLAMA, MISTRAL)
_ANY_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))
# A single \s* between two parts: adjacent ones would backtrack in quadratic or cubic time.
_MISTRAL_HEAD = re.compile(r"\s*([\w.-]+)(?:\s*\[CALL_ID\]\w*)?(?:\s*\[ARGS\])?\s*")
MAX_MISTRAL_HEAD_CHARS = 200
MAX_GAP_CHARS = 1000
"""White space between a marker and its call; more means that there is no call."""
_SLICE_CHARS = 4096
"""Characters parsed at once; a state copies the rest of the buffer, so the buffer stays short."""
_MAX_MARKER_CHARS = max(map(len, _MARKERS))
_SEPARATORS = " \t\r\n;,"
"""Between the calls of one answer."""


@dataclass(frozen=True, slots=True)
class AnswerText:
    """Text outside all calls."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call of the tool `name` begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments, as JSON text."""

    index: int
    text: str


ParsedPart = AnswerText | ToolCallStart | ToolCallArguments


class AnswerParser(Protocol):
    """Splits the text of one answer into content and tool calls."""

    def feed(self, text: str) -> list[ParsedPart]:
        """Takes the next piece; returns the parts that it made certain."""

    def finish(self) -> list[ParsedPart]:
        """Ends the text; returns the parts held back so far."""


class ForcedCallParser:
    """For an answer that a guide forced to be the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[ParsedPart]:
        """See AnswerParser."""
        if not text:
            return []
        begins: list[ParsedPart] = [] if self._has_begun else [ToolCallStart(0, self._name)]
        self._has_begun = True
        return [*begins, ToolCallArguments(0, text)]

    def finish(self) -> list[ParsedPart]:
        """See AnswerParser."""
        return []


class ToolCallParser:
    """For an answer that may call the tools in `names`; calls beyond `max_calls` are dropped."""

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        self._names = names
        self._max_calls = max_calls
        self._num_calls = 0
        self._buffer = ""
        self._spaces: list[str] = []
        """White space held back, because it is dropped before a call."""
        self._opening = ""
        """Text before a possible call; it becomes content if the call turns out to be none."""
        self._is_strict = False
        """Accept calls of known tools only, because no marker announced them."""
        self._is_array = False
        self._scanner = ToolCallScanner()
        self._has_begun = False
        self._state: Callable[[], bool] = self._at_start
        self._found: list[ParsedPart] = []

    def feed(self, text: str) -> list[ParsedPart]:
        """See AnswerParser."""
        for at in range(0, len(text), _SLICE_CHARS):
            self._buffer += text[at : at + _SLICE_CHARS]
            while self._buffer and self._state():
                pass
        return self._take_found()

    def finish(self) -> list[ParsedPart]:
        """See AnswerParser."""
        if self._state != self._after_call:
            raw = self._scanner.raw if self._state == self._in_call and not self._has_begun else ""
            self._emit_text(self._opening + raw + self._buffer)
        self._buffer = self._opening = ""
        if self._spaces and not self._num_calls:
            self._found.append(AnswerText("".join(self._spaces)))
        return self._take_found()

    # Each state consumes what it can of the buffer and returns False when it needs more text.

    def _at_start(self) -> bool:
        self._emit_text(self._take_spaces())
        self._is_strict = True
        if self._buffer.startswith("{"):
            return self._begin(ToolCallScanner(self._names))
        if self._buffer.startswith("["):
            inner = self._buffer[1:].lstrip()
            if inner.startswith("{"):
                return self._begin_array()
            if not inner and len(self._buffer) <= MAX_GAP_CHARS:
                return False
        elif not self._buffer:
            return False
        return self._go_on(self._in_content)

    def _in_content(self) -> bool:
        marker = _ANY_MARKER.search(self._buffer)
        if marker is None:
            kept = len(self._buffer) - _partial_marker_chars(self._buffer)
            self._emit_text(self._buffer[:kept])
            self._buffer = self._buffer[kept:]
            return False
        self._emit_text(self._buffer[: marker.start()])
        self._buffer = self._buffer[marker.end() :]
        self._opening = marker.group()
        self._is_strict = self._is_array = False
        return self._go_on(self._after_marker)

    def _after_marker(self) -> bool:
        marker, text = self._opening, self._buffer.lstrip()
        if len(self._buffer) - len(text) > MAX_GAP_CHARS:
            return self._is_no_call(marker)
        if text.startswith("{"):
            self._opening += self._take_spaces()
            return self._begin(ToolCallScanner())
        if not text:
            return False
        if marker != MISTRAL:
            return self._is_no_call(marker)
        inner = text.removeprefix("[").lstrip()
        if not text.startswith("["):
            return self._after_mistral()
        if inner.startswith("{"):
            return self._begin_array()
        return bool(inner or len(text) > MAX_GAP_CHARS) and self._is_no_call(marker)

    def _after_mistral(self) -> bool:
        """At the name of a tool, followed by its arguments."""
        brace = self._buffer.find("{", 0, MAX_MISTRAL_HEAD_CHARS + 1)
        if brace < 0 and len(self._buffer) <= MAX_MISTRAL_HEAD_CHARS:
            return False
        head = _MISTRAL_HEAD.fullmatch(self._buffer, 0, brace) if brace > 0 else None
        if head is None:
            return self._is_no_call(self._opening)
        self._buffer = self._buffer[brace:]
        return self._begin(ToolCallScanner.of_arguments(head[1]))

    def _in_call(self) -> bool:
        scanner = self._scanner
        self._buffer = self._buffer[scanner.feed(self._buffer) :]
        if scanner.is_rejected:
            return self._is_no_call(self._opening + scanner.raw)
        if scanner.is_call:
            self._emit_call(scanner)
        return scanner.is_done and self._go_on(self._after_call)

    def _after_call(self) -> bool:
        self._buffer = self._buffer.lstrip(_SEPARATORS)
        if self._buffer.startswith("{"):
            return self._begin(ToolCallScanner(self._names if self._is_strict else None))
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

    def _begin(self, scanner: ToolCallScanner) -> bool:
        self._scanner = scanner
        self._has_begun = False
        return self._go_on(self._in_call)

    def _begin_array(self) -> bool:
        brace = self._buffer.index("{")
        self._opening += self._buffer[:brace]
        self._buffer = self._buffer[brace:]
        self._is_array = True
        return self._begin(ToolCallScanner(self._names if self._is_strict else None))

    def _is_no_call(self, text: str) -> bool:
        self._opening = ""
        if self._is_strict:
            self._buffer = text + self._buffer  # there may be a marker in it
        else:
            self._emit_text(text)
        return self._go_on(self._in_content)

    def _emit_call(self, scanner: ToolCallScanner) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._num_calls += 1
            self._opening = ""
            self._spaces.clear()
            self._emit(ToolCallStart(self._num_calls - 1, scanner.name or ""))
        text = scanner.take_arguments()
        if text:
            self._emit(ToolCallArguments(self._num_calls - 1, text))

    def _emit(self, found: ToolCallStart | ToolCallArguments) -> None:
        if self._max_calls is None or found.index < self._max_calls:
            self._found.append(found)

    def _emit_text(self, text: str) -> None:
        kept = text.rstrip()
        if kept:
            self._found.append(AnswerText("".join([*self._spaces, kept])))
            self._spaces.clear()
        if len(kept) < len(text):
            self._spaces.append(text[len(kept) :])

    def _take_spaces(self) -> str:
        rest = self._buffer.lstrip()
        spaces = self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest
        return spaces

    def _take_found(self) -> list[ParsedPart]:
        found, self._found = self._found, []
        return found


def _partial_marker_chars(text: str) -> int:
    """Length of the longest suffix that may begin a marker."""
    for length in range(min(len(text), _MAX_MARKER_CHARS - 1), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in _MARKERS):
            return length
    return 0

"""Scans one tool call, a JSON object written by a model, as it streams in."""

from __future__ import annotations

import json
from collections.abc import Collection

_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_KEYS = _ARGUMENT_KEYS | {"name", "type", "id"}


class ToolCallScanner:
    """Reads `{"name": ..., "arguments": {...}}`; the keys may come in any order.

    The scanner only finds where values end: arguments pass through unchanged, valid or not. With
    `names`, it rejects everything but a call of one of these tools with arguments, because the
    object may be the answer itself.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.name: str | None = None
        self.is_done = False
        self.is_rejected = False
        self.raw = ""
        """The text read so far; once it is certain to be a call, without the arguments taken."""
        self._names = names
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self._key: str | None = None
        self._start: int | None = None
        """Where the current key or value begins in `raw`."""
        self._has_arguments = False
        self._arguments_at: int | None = None
        """Where the arguments not yet taken begin in `raw`."""
        self._taken: list[str] = []
        self._is_value_only = False

    @classmethod
    def of_arguments(cls, name: str) -> ToolCallScanner:
        """A scanner for the arguments alone, where the tool's name is known."""
        scanner = cls()
        scanner.name = name
        scanner._depth = 1
        scanner._key = "arguments"
        scanner._is_value_only = True
        return scanner

    @property
    def is_call(self) -> bool:
        """True once the object is certain to be a call of a known tool name."""
        known = self.name is not None and not self.is_rejected
        return known and (self._has_arguments or (self._names is None and self.is_done))

    def feed(self, text: str) -> int:
        """Reads on; returns how many characters of `text` belong to the object."""
        begin = len(self.raw)
        self.raw += text
        for at, character in enumerate(text, start=begin):
            self._step(at, character)
            if self.is_done or self.is_rejected:
                self.raw = self.raw[: at + 1]
                break
        return len(self.raw) - begin

    def take_arguments(self) -> str:
        """Arguments text since the last call; `{}` at the end of a call without arguments."""
        if self._arguments_at is not None:
            self._taken.append(self.raw[self._arguments_at :])
            self._arguments_at = len(self.raw)
            if self.is_call:
                # Forgotten, or each piece of long arguments would copy all of them.
                self.raw = ""
                self._start = self._arguments_at = 0
        if self.is_done and not self._has_arguments:
            self._has_arguments = True
            self._taken.append("{}")
        text = "".join(self._taken)
        self._taken.clear()
        return text

    def _step(self, at: int, character: str) -> None:
        if self._is_in_string:
            self._string_goes_on(at, character)
        elif character == '"':
            self._is_in_string = True
            self._value_begins(at)
        elif character in "{[":
            self._depth += 1
            if self._depth == 2:
                self._value_begins(at, is_object=character == "{")
        elif character in "}]":
            self._bracket_closes(at)
        elif self._depth == 1 and character == ":":
            self._key_ends(at)
        elif self._depth == 1 and character == ",":
            self._value_ends(at)
        elif not character.isspace():
            self._value_begins(at)

    def _bracket_closes(self, at: int) -> None:
        if self._depth == 1:
            self._value_ends(at)
        self._depth -= 1
        if self._depth == 1:
            self._value_ends(at + 1)
            self.is_done = self._is_value_only
        elif self._depth == 0:
            self._ends()

    def _string_goes_on(self, at: int, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_in_string = False
            if self._depth == 1 and self._key is not None:
                self._value_ends(at + 1)

    def _value_begins(self, at: int, *, is_object: bool = False) -> None:
        if self._start is not None:
            return
        self._start = at
        if is_object and self._key in _ARGUMENT_KEYS and not self._has_arguments:
            self._has_arguments = True
            self._arguments_at = at

    def _key_ends(self, at: int) -> None:
        if self._start is None or self._key is not None:
            return
        key = _loads(self.raw[self._start : at])
        self._start = None
        self._key = key if isinstance(key, str) else ""
        is_foreign = self._names is not None and self._key not in _KEYS
        self.is_rejected = is_foreign and not self.is_call

    def _value_ends(self, end: int) -> None:
        if self._start is None or self._key is None:
            return
        text, key = self.raw[self._start : end], self._key
        self._start = self._key = None
        if key == "name" and self.name is None:
            name = _loads(text)
            self.name = name if isinstance(name, str) and name else None
            self.is_rejected = self._names is not None and self.name not in self._names
        elif self._arguments_at is not None:
            self._taken.append(self.raw[self._arguments_at : end])
            self._arguments_at = None
        elif key in _ARGUMENT_KEYS and not self._has_arguments:
            self._has_arguments = True
            self._taken.append(_plain(text))

    def _ends(self) -> None:
        self.is_done = True
        is_call = self.name is not None and (self._has_arguments or self._names is None)
        self.is_rejected = not is_call


def _plain(text: str) -> str:
    """Arguments that are no object: some models write the object as a text, or null for none."""
    value = _loads(text)
    if isinstance(value, str):
        return value
    return "{}" if value is None else text.strip()


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

"""What an output must match: a schema, a pattern, a grammar or one of some texts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any

from baton.core.errors import InvalidRequest

MAX_GUIDE_BYTES = 128 * 1024
"""Of a guide's text, in UTF-8."""
MAX_CHOICES = 4096
MAX_MULTIPLE = 100_000
"""Least common multiple of a schema's `multipleOf`, powers of ten apart. A grammar takes as many
states, and time by their square: 3 seconds for 300,000 (Nov 2026), all memory for 100,000,000."""

_NUMBERS = json.JSONDecoder(parse_float=Decimal)


class GuideKind(Enum):
    """How a guide's text is meant. The values are the names of the fields in baton.v1.Guide."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    """Any JSON object; there is no text."""
    REGEX = "regex"
    """In the syntax of Rust's regex crate; matches the whole output."""
    LARK = "lark"
    """A context-free grammar in llguidance's variant of Lark's syntax, or in GBNF."""
    CHOICE = "choice"
    """One of some texts; as text, a JSON array of them."""


@dataclass(frozen=True, slots=True)
class Guide:
    """What the whole output must match. Its grammar is checked by the worker that compiles it."""

    kind: GuideKind
    text: str = ""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Guide:
        """JSON that fulfils a schema."""
        return cls(GuideKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))

    @classmethod
    def json_object(cls) -> Guide:
        """Any JSON object."""
        return cls(GuideKind.JSON_OBJECT)

    @classmethod
    def regex(cls, pattern: str) -> Guide:
        """What a regular expression matches as a whole."""
        return cls(GuideKind.REGEX, pattern)

    @classmethod
    def lark(cls, grammar: str) -> Guide:
        """What a context-free grammar makes."""
        return cls(GuideKind.LARK, grammar)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Guide:
        """Exactly one of the texts."""
        return cls(GuideKind.CHOICE, json.dumps(list(options), ensure_ascii=False))

    def choices(self) -> list[str]:
        """The texts of a choice.

        Raises:
            InvalidRequest: it is not an array of texts, has none or too many, or one is empty.
        """
        try:
            options = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest("guide.choice must be a JSON array of texts") from error
        if not isinstance(options, list) or not all(isinstance(one, str) for one in options):
            raise InvalidRequest("guide.choice must be a list of texts")
        if not 1 <= len(options) <= MAX_CHOICES or not all(options):
            raise InvalidRequest(f"guide.choice must have 1 to {MAX_CHOICES} texts, none empty")
        return options

    def check(self) -> Guide:
        """Returns itself.

        Raises:
            InvalidRequest: the text is too long, missing, or no JSON where it must be.
        """
        num_bytes = len(self.text.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_GUIDE_BYTES:
            raise InvalidRequest(
                f"guide.{self.kind.value} must have at most {MAX_GUIDE_BYTES} bytes, "
                f"got {num_bytes}"
            )
        if self.kind is GuideKind.JSON_OBJECT:
            return self
        if not self.text.strip():
            raise InvalidRequest(f"guide.{self.kind.value} must not be empty")
        if self.kind is GuideKind.CHOICE:
            self.choices()
        if self.kind is GuideKind.JSON_SCHEMA:
            schema = self._decoded(_NUMBERS.decode)
            if not isinstance(schema, dict):
                raise InvalidRequest("guide.json_schema must be a JSON object")
            _check_multiples(schema)
        if self.kind is GuideKind.LARK:
            for found in re.finditer(r"%json\b[^{]*", self.text):
                _check_multiples(self._decoded(_NUMBERS.raw_decode, found.end())[0])
        return self

    def _decoded(self, decode: Callable[..., Any], *where: int) -> Any:
        try:
            return decode(self.text, *where)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"guide.{self.kind.value} is not JSON: {error}") from error


def _check_multiples(schema: Any) -> None:
    """Refuses a schema whose numbers would take too many states.

    Raises:
        InvalidRequest: see `MAX_MULTIPLE`.
    """
    multiple, pending = 1, [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        pending += value.values()
        number = value.get("multipleOf")
        if isinstance(number, (int, Decimal)) and Decimal(number).is_finite():
            digits = "".join(map(str, Decimal(number).as_tuple().digits)).rstrip("0")
            # Python refuses to read numbers of thousands of digits; these are too large already.
            is_readable = len(digits) <= len(str(MAX_MULTIPLE))
            multiple = math.lcm(multiple, int(digits or 1) if is_readable else MAX_MULTIPLE + 1)
        if multiple > MAX_MULTIPLE:
            raise InvalidRequest(
                f"multipleOf in a guide is served up to a common multiple of {MAX_MULTIPLE}"
            )

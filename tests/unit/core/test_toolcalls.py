"""Tool calls found in a model's text, however it is cut into pieces."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.toolcalls import parser
from baton.core.toolcalls.parser import (
    AnswerText,
    ForcedCallParser,
    ToolCallArguments,
    ToolCallParser,
    ToolCallStart,
)

NAMES = frozenset({"f", "get.weather"})
Whole = tuple[str, list[tuple[str, str]]]


def read(reader: ToolCallParser | ForcedCallParser, pieces: list[str]) -> Whole:
    content, calls = "", []
    events = [event for piece in pieces for event in reader.feed(piece)] + reader.finish()
    for event in events:
        match event:
            case AnswerText(text):
                assert text
                content += text
            case ToolCallStart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case ToolCallArguments(index, text):
                assert text
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, calls


def whole(text: str, max_calls: int | None = None) -> Whole:
    return read(ToolCallParser(NAMES, max_calls), [text])


CASES = {
    "plain": ("Hello.\n ", ("Hello.\n ", [])),
    "empty": ("", ("", [])),
    "hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}\n</tool_call>',
        ("", [("f", '{"a": [1, {"b": "}"}]}')]),
    ),
    "hermes twice, with text around": (
        'Let me see. \n<tool_call>{"name":"f","arguments":{}}</tool_call>\n'
        '<tool_call>{"arguments": {"x": "\\"{"}, "name": "g"}</tool_call>\n done ',
        ("Let me see.done", [("f", "{}"), ("g", '{"x": "\\"{"}')]),
    ),
    "hermes without its end": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}',
        ("", [("f", '{"a": 1}')]),
    ),
    "hermes cut in its end": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool',
        ("", [("f", '{"a": 1}')]),
    ),
    "hermes without arguments": ('<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    "hermes with arguments as text": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", [("f", '{"a": 1}')]),
    ),
    "hermes with null": (
        '<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", [("f", "{}")]),
    ),
    "hermes without a name": ('<tool_call> {"a": 1} x', ('<tool_call> {"a": 1} x', [])),
    "hermes that is no object": ("<tool_call> what", ("<tool_call> what", [])),
    "marker alone": ("a <tool_call> ", ("a <tool_call> ", [])),
    "cut marker": ("a <tool_", ("a <tool_", [])),
    "cut in the arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": "x', ("", [("f", '{"a": "x')]),
    ),
    "cut in the name": ('<tool_call>{"name": "f', ('<tool_call>{"name": "f', [])),
    "llama": (' {"name": "f", "parameters": {"a": 1}}', ("", [("f", '{"a": 1}')])),
    "llama several": (
        '{"name": "f", "parameters": {}}; {"name": "get.weather", "parameters": {"b": 2}}',
        ("", [("f", "{}"), ("get.weather", '{"b": 2}')]),
    ),
    "llama with its tag": (
        '<|python_tag|>{"type": "function", "name": "h", "parameters": {"a": 1}}',
        ("", [("h", '{"a": 1}')]),
    ),
    "llama's own tool": ("<|python_tag|>f.call(1)", ("<|python_tag|>f.call(1)", [])),
    "object that is the answer": ('{"a": {"name": "f"}} x', ('{"a": {"name": "f"}} x', [])),
    "object with another name": (
        '{"name": "Rex", "parameters": {}}', ('{"name": "Rex", "parameters": {}}', []),
    ),
    "object with a name only": (' {"name": "f"} ', (' {"name": "f"} ', [])),
    "object in the middle": (
        'see {"name": "f", "parameters": {}}', ('see {"name": "f", "parameters": {}}', []),
    ),
    "llama with more keys": ('{"name": "f", "parameters": {}, "z": 1}', ("", [("f", "{}")])),
    "bare array": (
        '[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {"a": 2}}]',
        ("", [("f", "{}"), ("f", '{"a": 2}')]),
    ),
    "array that is the answer": ('[ {"x": 1}, 2]', ('[ {"x": 1}, 2]', [])),
    "list that is the answer": ("[1, 2]", ("[1, 2]", [])),
    "mistral": (
        '[TOOL_CALLS] [{"name": "h", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}] ',
        ("", [("h", '{"a": 1}'), ("f", "{}")]),
    ),
    "mistral with names": (
        'Ok.[TOOL_CALLS]get.weather[CALL_ID]x1[ARGS]{"a": "}"}[TOOL_CALLS]f{"b": 1}',
        ("Ok.", [("get.weather", '{"a": "}"}'), ("f", '{"b": 1}')]),
    ),
    "mistral that is none": (
        "[TOOL_CALLS]" + "a b" * 100 + "{}", ("[TOOL_CALLS]" + "a b" * 100 + "{}", []),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_calls_are_found_in_every_format(name):
    text, expected = CASES[name]
    assert whole(text) == expected
    assert read(ToolCallParser(NAMES), list(text)) == expected


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


FRAGMENTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[", "]", "{", "}",
    '"name"', '"arguments"', '"parameters"', ":", ",", ";", " ", "\n", '"f"', '"', "\\", "1", "f",
    '{"name": "f", "arguments": {"a": "b"}}', '{"name": "f", "parameters"', "null", "ü", "<tool",
])  # fmt: skip
PLACES = st.lists(st.integers(0, 400), max_size=12)


@given(st.lists(FRAGMENTS, max_size=14).map("".join), PLACES)
def test_pieces_make_no_difference(text, places):
    assert read(ToolCallParser(NAMES), cut(text, places)) == whole(text)


@given(st.sampled_from(sorted(CASES)), PLACES)
def test_pieces_make_no_difference_to_real_answers(name, places):
    text, expected = CASES[name]
    assert read(ToolCallParser(NAMES), cut(text, places)) == expected


@given(st.text(alphabet="ab \n<{}[]\"':,;|_tool", max_size=60))
def test_text_without_calls_is_left_as_it_is(text):
    content, calls = whole(text)
    assert calls or content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
CALLS = st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=3), min_size=1, max_size=3)


@given(CALLS, PLACES, st.sampled_from(["hermes", "llama", "mistral", "bare array"]))
def test_whatever_the_arguments_are_they_arrive(arguments, places, style):
    key = "parameters" if style == "llama" else "arguments"
    objects = [json.dumps({"name": "f", key: value}) for value in arguments]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects),
        "llama": "; ".join(objects),
        "mistral": f"[TOOL_CALLS][{', '.join(objects)}]",
        "bare array": f"[{', '.join(objects)}]",
    }[style]
    content, calls = read(ToolCallParser(NAMES), cut(text, places))
    assert content == ""
    assert [name for name, _ in calls] == ["f"] * len(arguments)
    assert [json.loads(text) for _, text in calls] == arguments


def test_arguments_are_told_while_they_come():
    reader = ToolCallParser(NAMES)
    assert reader.feed('<tool_call>{"name": "f", ') == []
    assert reader.feed('"arguments": {"a": "x') == [
        ToolCallStart(0, "f"),
        ToolCallArguments(0, '{"a": "x'),
    ]
    assert reader.feed('y"') == [ToolCallArguments(0, 'y"')]
    assert reader.feed("}}") == [ToolCallArguments(0, "}")]


def test_calls_beyond_the_most_are_dropped():
    text = CASES["hermes twice, with text around"][0]
    assert whole(text, max_calls=1)[1] == [("f", "{}")]


def test_a_forced_tool_gets_the_whole_text_as_arguments():
    assert read(ForcedCallParser("f"), ["", '{"a"', ": 1}"]) == ("", [("f", '{"a": 1}')])
    assert read(ForcedCallParser("f"), []) == ("", [])


class CountingPattern:
    """Counts the characters that a pattern is matched against."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.num_chars = pattern, 0

    def fullmatch(self, text: str, begin: int, end: int) -> re.Match[str] | None:
        self.num_chars += end - begin
        return self.pattern.fullmatch(text, begin, end)


@pytest.mark.parametrize("size", [1, 30, 4096, 1 << 20])
@pytest.mark.parametrize(
    "before", ["[TOOL_CALLS]a", "[TOOL_CALLS]", "[TOOL_CALLS][", "[", "<tool_call>", ""]
)
def test_white_space_is_refused_before_it_is_matched(monkeypatch, before, size):
    counting = CountingPattern(parser._MISTRAL_HEAD)
    monkeypatch.setattr(parser, "_MISTRAL_HEAD", counting)
    text = before + " " * 100_000 + "x{"
    reader, longest, events = ToolCallParser(NAMES), 0, []
    for at in range(0, len(text), size):
        events += reader.feed(text[at : at + size])
        longest = max(longest, len(reader._buffer))
    events += reader.finish()
    assert "".join(event.text for event in events) == text
    assert counting.num_chars <= parser.MAX_MISTRAL_HEAD_CHARS
    assert longest <= parser.MAX_GAP_CHARS + 4096


def backtracks(pattern: str) -> bool:
    """True when two parts of a pattern that may match the same spaces stand side by side."""
    return bool(re.search(r"\\s\*(?:\(\?:[^()]*\)\?)*\\s\*", pattern))


def test_no_two_parts_of_the_pattern_share_white_space():
    assert backtracks(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*")
    assert not backtracks(parser._MISTRAL_HEAD.pattern)


def test_long_arguments_are_not_kept():
    reader = ToolCallParser(NAMES)
    reader.feed('<tool_call>{"name": "f", "arguments": {"a": "')
    for _ in range(100):
        assert reader.feed("x" * 1000) == [ToolCallArguments(0, "x" * 1000)]
    assert len(reader._scanner.raw) <= 1000
    assert reader.feed('"}}') == [ToolCallArguments(0, '"}')]

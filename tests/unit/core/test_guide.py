from __future__ import annotations

import pytest

from baton.core.errors import InvalidRequest
from baton.core.guide import MAX_CHOICES, MAX_GUIDE_BYTES, Guide, GuideKind
from baton.core.sampling import SamplingParams


@pytest.mark.parametrize(
    "guide",
    [
        Guide(GuideKind.JSON_SCHEMA, '{"type": "object"}'),
        Guide(GuideKind.JSON_OBJECT),
        Guide(GuideKind.REGEX, "a+"),
        Guide(GuideKind.REGEX, "ü" * (MAX_GUIDE_BYTES // 2)),
        Guide(GuideKind.LARK, 'start: "a"'),
        Guide.choice(["yes", "nö"]),
        Guide.json_schema({"anyOf": [{"multipleOf": 0.01}, {"multipleOf": 5_000_000}]}),
        Guide.json_schema({"properties": {"multipleOf": {"type": "string"}}}),
        Guide(GuideKind.LARK, 'start: "{" x\nx: %json {"type": "integer", "multipleOf": 60}'),
    ],
)
def test_every_kind_passes_and_says_what_it_is(guide: Guide) -> None:
    assert guide.check() is guide
    assert SamplingParams(guide=guide).check().guide is guide


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (Guide(GuideKind.JSON_SCHEMA, "{"), "not JSON"),
        (Guide(GuideKind.JSON_SCHEMA, "[" * 60_000), "not JSON"),
        (Guide(GuideKind.JSON_SCHEMA, "true"), "JSON object"),
        (Guide(GuideKind.JSON_SCHEMA, ""), "empty"),
        (Guide(GuideKind.REGEX, " "), "empty"),
        (Guide(GuideKind.LARK, ""), "empty"),
        (Guide(GuideKind.REGEX, "ü" * MAX_GUIDE_BYTES), "bytes"),
        (Guide(GuideKind.CHOICE, "yes"), "JSON array"),
        (Guide(GuideKind.CHOICE, "[1]"), "list of texts"),
        (Guide.json_schema({"items": [{"multipleOf": 1_234_567}]}), "multipleOf"),
        (Guide(GuideKind.JSON_SCHEMA, '{"multipleOf": 0.%s}' % ("1" * 5000)), "multipleOf"),
        (Guide.json_schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 9.91}]}), "multipleOf"),
        (Guide(GuideKind.JSON_SCHEMA, '{"multiple\\u004ff": 100003}'), "multipleOf"),
        (Guide(GuideKind.LARK, 'start: %json // x\n {"multipleOf": 100003}'), "multipleOf"),
        (Guide(GuideKind.LARK, "start: %json {1}"), "not JSON"),
        (Guide.choice([]), "1 to"),
        (Guide.choice(["a", ""]), "none empty"),
        (Guide.choice(["a"] * (MAX_CHOICES + 1)), "1 to"),
    ],
)
def test_what_cannot_be_a_guide_is_refused(guide: Guide, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        SamplingParams(guide=guide).check()


def test_choices_survive_as_text() -> None:
    options = ['say "hi"', "back\\slash", "zwei\nZeilen", "😀"]
    assert Guide.choice(options).choices() == options


def test_a_guide_and_ignored_ends_contradict_each_other() -> None:
    params = SamplingParams(guide=Guide(GuideKind.JSON_OBJECT), ignore_eos=True)
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        params.check()

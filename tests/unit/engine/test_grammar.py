"""Masks: right for every kind of guide, and a function of the tokens alone."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from baton.core.errors import InvalidRequest, Unsupported
from baton.core.guide import MAX_CHOICES, Guide, GuideKind
from baton.engine.grammar import GrammarConstraint, Grammars
from tests.support.tiny_models import EOS_TOKEN_ID, save_byte_tokenizer
from tests.support.tiny_tokenizer import sentencepiece_like

VOCAB_SIZE = 320
PROMPT = [5, 6, 7]
SCHEMA = Guide(
    GuideKind.JSON_SCHEMA,
    json.dumps({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "kind": {"enum": ["cat", "dög", 3]},
            "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        "required": ["name", "kind"],
        "additionalProperties": False,
    }),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(directory, VOCAB_SIZE)
    return directory


@pytest.fixture(scope="module")
def texts(directory: Path) -> dict[int, bytes]:
    """Bytes of each token."""
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    alphabet = {character: byte for byte, character in _bytes_to_characters().items()}
    return {
        token_id: bytes(alphabet[character] for character in text)
        for text, token_id in vocab.items()
        if not text.startswith("<|")
    }


def _bytes_to_characters() -> dict[int, str]:
    """GPT-2's: printable bytes stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def _grammars(directory: Path, **settings: int) -> Grammars:
    return Grammars(
        directory, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS_TOKEN_ID}), **settings
    )


def _allowed(mask: bytes | None) -> list[int]:
    assert mask is not None
    return [index for index in range(VOCAB_SIZE) if mask[index // 8] >> index % 8 & 1]


def _walk(constraint: GrammarConstraint, rng: random.Random) -> list[int]:
    """A random output that the masks allow, up to its end."""
    output: list[int] = []
    while len(output) < 500:
        allowed = _allowed(constraint.mask([*PROMPT, *output], ()))
        output.append(rng.choice(allowed))
        if output[-1] == EOS_TOKEN_ID:
            return output
    raise AssertionError(f"no end in sight: {output}")


def _text(output: list[int], texts: dict[int, bytes]) -> str:
    assert output[-1] == EOS_TOKEN_ID
    return b"".join(texts[token_id] for token_id in output[:-1]).decode()


def test_a_schema_allows_what_fulfils_it_and_nothing_else(
    directory: Path, texts: dict[int, bytes]
) -> None:
    grammars, rng = _grammars(directory), random.Random(1)
    seen = set()
    for _ in range(20):
        text = _text(_walk(grammars.constraint(SCHEMA, len(PROMPT)), rng), texts)
        value = json.loads(text)
        assert {"name", "kind"} <= set(value) <= {"name", "kind", "sizes"}
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 6
        assert value["kind"] in {"cat", "dög", 3}
        assert all(type(size) is int for size in value.get("sizes", ()))
        seen.add(text)
    assert len(seen) == 20


@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        (Guide(GuideKind.REGEX, r"[a-c]{2,5}-[0-9]{3}"), r"[a-c]{2,5}-[0-9]{3}"),
        (Guide(GuideKind.LARK, 'start: "(" (start | /x{1,3}/) ")"'), r"\(+x{1,3}\)+"),
        (Guide(GuideKind.LARK, 'root ::= "(" (root | [x]+) ")"'), r"\(+x+\)+"),
        (Guide.choice(["yes", 'n"o\\', "jä\n"]), r'yes|n"o\\|jä\n'),
    ],
    ids=["regex", "lark", "gbnf", "choice"],
)
def test_regex_lark_and_choice(
    directory: Path, texts: dict[int, bytes], guide: Guide, pattern: str
) -> None:
    grammars, rng = _grammars(directory), random.Random(2)
    outputs = {_text(_walk(grammars.constraint(guide, len(PROMPT)), rng), texts) for _ in range(30)}
    assert len(outputs) >= 3
    for output in outputs:
        assert re.fullmatch(pattern, output)
        if guide.kind is GuideKind.LARK:
            assert output.count("(") == output.count(")")


def test_thousands_of_choices_are_no_problem(directory: Path, texts: dict[int, bytes]) -> None:
    rng = random.Random(5)
    options = ["".join(rng.choices("abcdefgh", k=20)) for _ in range(MAX_CHOICES)]
    constraint = _grammars(directory).constraint(Guide.choice(options), len(PROMPT))
    assert _text(_walk(constraint, rng), texts) in options


def test_any_json_object_begins_and_ends_as_one(directory: Path, texts: dict[int, bytes]) -> None:
    constraint = _grammars(directory).constraint(Guide(GuideKind.JSON_OBJECT), 0)
    by_text = {text: token_id for token_id, text in texts.items()}
    assert _allowed(constraint.mask([], ())) == [by_text[b"{"]]
    opened = [by_text[b"{"]]
    allowed = _allowed(constraint.mask(opened, ()))
    assert EOS_TOKEN_ID not in allowed
    closed = [*opened, by_text[b"}"]]
    assert _allowed(constraint.mask(closed, ())) == [EOS_TOKEN_ID]


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('{"a":[1,{}]}', True),
        ('{"a": [1, {}]}', True),
        ('{\n  "a": [\n    1,\n    {}\n  ]\n}', True),
        ('{\n\t"a": 1\n}', True),
        ('{  "a": 1}', False),
        ('{\n\n"a": 1}', False),
    ],
)
def test_json_is_indented_as_people_do(
    directory: Path, texts: dict[int, bytes], text: str, is_allowed: bool
) -> None:
    by_text = {text: token_id for token_id, text in texts.items()}
    tokens = [by_text[bytes([byte])] for byte in text.encode()]
    constraint = _grammars(directory).constraint(Guide.json_object(), 0)
    mask = constraint.mask(tokens, ())
    assert (mask is not None and EOS_TOKEN_ID in _allowed(mask)) is is_allowed


def test_the_end_comes_only_where_the_guide_is_fulfilled(
    directory: Path, texts: dict[int, bytes]
) -> None:
    constraint = _grammars(directory).constraint(Guide(GuideKind.REGEX, "z(zz)*"), 0)
    z = next(token_id for token_id, text in texts.items() if text == b"z")
    for length in range(1, 8):
        allowed = _allowed(constraint.mask([z] * length, ()))
        assert (EOS_TOKEN_ID in allowed) is (length % 2 == 1)


def test_vocabularies_with_byte_fallback_can_be_guided(tmp_path: Path) -> None:
    """As Llama 2 has one: a mark for spaces, single bytes for what has no token."""
    tokenizer = Tokenizer.from_file(str(sentencepiece_like(tmp_path) / "tokenizer.json"))
    options = ["hello world", "wörld hello"]
    grammars = Grammars(tmp_path, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({2}))
    seen, rng = set(), random.Random(7)
    for _ in range(20):
        constraint = grammars.constraint(Guide.choice(options), 0)
        output: list[int] = []
        while 2 not in output:
            output.append(rng.choice(_allowed(constraint.mask(output, ()))))
        seen.add(tokenizer.decode(output))
    assert seen == set(options)


def test_special_tokens_are_no_text(directory: Path) -> None:
    constraint = _grammars(directory).constraint(Guide(GuideKind.REGEX, "(.|\n)*"), 0)
    allowed = _allowed(constraint.mask([], ()))
    assert EOS_TOKEN_ID in allowed
    assert EOS_TOKEN_ID + 1 not in allowed
    assert len(allowed) > 100


def test_replay_gives_the_masks_of_step_by_step(directory: Path) -> None:
    grammars, rng = _grammars(directory), random.Random(3)
    for _ in range(5):
        output = _walk(grammars.constraint(SCHEMA, len(PROMPT)), rng)
        stepwise = grammars.constraint(SCHEMA, len(PROMPT))
        for length in range(len(output)):
            tokens = [*PROMPT, *output[:length]]
            replayed = grammars.constraint(SCHEMA, len(PROMPT))
            assert replayed.mask(tokens, ()) == stepwise.mask(tokens, ())


def test_masks_along_drafts_are_those_of_known_tokens(directory: Path) -> None:
    """In any order of asking, with accepted, refused and impossible drafts between."""
    grammars, rng = _grammars(directory), random.Random(4)
    for _ in range(10):
        output = _walk(grammars.constraint(SCHEMA, len(PROMPT)), rng)
        other = _walk(grammars.constraint(SCHEMA, len(PROMPT)), rng)
        constraint = grammars.constraint(SCHEMA, len(PROMPT))
        known = 0
        while known < len(output):
            drafts = [*output[known : known + rng.randrange(5)], *other[: rng.randrange(3)]]
            asked = list(range(len(drafts) + 1)) * 2
            if rng.random() < 0.5:
                rng.shuffle(asked)
            for num_drafts in asked:
                shown = [*PROMPT, *output[:known]]
                mask = constraint.mask(shown, drafts[:num_drafts])
                plain = grammars.constraint(SCHEMA, len(PROMPT))
                expected = plain.mask([*shown, *drafts[:num_drafts]], ())
                is_over = EOS_TOKEN_ID in drafts[:num_drafts]
                assert mask == expected or is_over
                assert constraint.failure is None
            known += rng.randrange(1, 4)


def test_sequences_do_not_share_their_progress(directory: Path, texts: dict[int, bytes]) -> None:
    grammars = _grammars(directory)
    guide = Guide.choice(["ja", "nein"])
    one, other = grammars.constraint(guide, 0), grammars.constraint(guide, 0)
    before = other.mask([], ())
    by_text = {text: token_id for token_id, text in texts.items()}
    one.mask([by_text[b"n"]], ())
    assert other.mask([], ()) == before
    assert grammars.constraint(guide, 0).mask([], ()) == before


def test_an_output_that_cannot_have_come_fails_the_sequence(directory: Path) -> None:
    constraint = _grammars(directory).constraint(Guide.choice(["yes"]), 0)
    assert constraint.mask([1, 2, 3], ()) is None
    assert isinstance(constraint.failure, InvalidRequest)
    assert constraint.mask([1, 2, 3], ()) is None


def test_a_grammar_in_long_use_never_wears_out(directory: Path, texts: dict[int, bytes]) -> None:
    """Its copies share a lexer, whose states are limited: together these need more."""
    grammars, rng = _grammars(directory, max_lexer_states=500), random.Random(6)
    guide = Guide(GuideKind.REGEX, "(a|b)*a(a|b){14}c")
    by_text = {text: token_id for token_id, text in texts.items()}
    letters = [by_text[b"a"], by_text[b"b"]]
    constraints = [grammars.constraint(guide, 0) for _ in range(20)]
    outputs: list[list[int]] = [[] for _ in constraints]
    first = grammars.compile(guide)
    for _ in range(20):
        for constraint, output in zip(constraints, outputs, strict=True):
            drafts = rng.choices(letters, k=2)
            assert set(letters) <= set(_allowed(constraint.mask(output, ())))
            assert set(letters) <= set(_allowed(constraint.mask(output, drafts[:1])))
            output += drafts[: rng.randrange(1, 3)]
    assert all(constraint.failure is None for constraint in constraints)
    assert grammars.compile(guide) is not first, "the limit was not reached"


def test_an_output_that_outgrows_the_limits_alone_fails(
    directory: Path, texts: dict[int, bytes]
) -> None:
    grammars, rng = _grammars(directory, max_lexer_states=100), random.Random(6)
    by_text = {text: token_id for token_id, text in texts.items()}
    constraint = grammars.constraint(Guide(GuideKind.REGEX, "(a|b)*a(a|b){14}c"), 0)
    output: list[int] = []
    while constraint.mask(output, ()) is not None:
        output.append(by_text[rng.choice([b"a", b"b"])])
        assert len(output) < 500
    assert isinstance(constraint.failure, InvalidRequest)
    assert "too many states" in constraint.failure.message


@pytest.mark.parametrize(
    "guide",
    [
        Guide(GuideKind.REGEX, "(("),
        Guide(GuideKind.REGEX, "(?=a)b"),
        Guide(GuideKind.REGEX, "[^\\x00-\\U0010FFFF]"),
        Guide.regex("|".join(f"[^{chr(0x4E00 + index)}]{{2,9}}" for index in range(1600))),
        Guide(GuideKind.LARK, "start: missing"),
        Guide(GuideKind.LARK, "this is no grammar"),
        Guide(GuideKind.LARK, "root ::= ("),
        Guide(GuideKind.JSON_SCHEMA, '{"type": "objekt"}'),
        Guide(GuideKind.JSON_SCHEMA, '{"type": "string", "pattern": "(("}'),
        Guide(GuideKind.JSON_SCHEMA, '{"$ref": "https://example.com/x"}'),
        Guide(GuideKind.JSON_SCHEMA, '{"not": {"type": "string"}}'),
        Guide(GuideKind.JSON_SCHEMA, '{"properties": 3}'),
    ],
    ids=lambda guide: guide.text[:40],
)
def test_what_is_malformed_or_not_supported_is_refused_with_a_reason(
    directory: Path, guide: Guide
) -> None:
    grammars = _grammars(directory)
    with pytest.raises(InvalidRequest, match=rf"guide\.{guide.kind.value} is refused: \S+"):
        grammars.compile(guide)
    assert guide not in grammars
    with pytest.raises(InvalidRequest):
        grammars.constraint(guide, 0)


def test_what_is_kept_is_bounded(directory: Path) -> None:
    grammars = _grammars(directory, max_compiled=3)
    guides = [Guide(GuideKind.REGEX, f"a{{{length}}}") for length in range(1, 6)]
    for guide in guides:
        grammars.compile(guide)
    assert len(grammars) == 3
    assert guides[0] not in grammars
    assert guides[4] in grammars
    grammars.constraint(guides[2], 0)
    grammars.compile(guides[0])
    assert guides[2] in grammars, "the one used last goes last"
    assert guides[3] not in grammars


def test_a_model_without_a_tokenizer_or_an_end_cannot_be_guided(
    directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=r"tokenizer\.json"):
        _grammars(tmp_path).compile(Guide(GuideKind.JSON_OBJECT))
    endless = Grammars(directory, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset())
    with pytest.raises(Unsupported, match="end-of-sequence"):
        endless.compile(Guide(GuideKind.JSON_OBJECT))

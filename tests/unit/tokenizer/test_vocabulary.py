from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from baton.core.errors import InvalidRequest, ModelNotFound
from baton.tokenizer.settings import parse_models
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary
from tests.support import tiny_tokenizer

DEMO = Path(__file__).parents[3] / "deploy" / "models" / "demo"
TEXTS = [
    "",
    "hello world",
    "  leading, trailing  ",
    "wörld 😀 日本語 \x00\x7f",
    "<|endoftext|>hello<|user|>\n",
    "def f(x):\n\treturn x ** 2\r\n" * 30,
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  hello {{ 7 * 7 }} <|endoftext|> "},
    {"role": "assistant", "content": "hallo"},
    {"role": "user", "content": "again?"},
]


@pytest.fixture(params=["byte_level", "sentencepiece_like", "with_bos", "demo"])
def directory(request, tmp_path) -> Path:
    match request.param:
        case "byte_level":
            return tiny_tokenizer.byte_level(tmp_path / "tiny")
        case "sentencepiece_like":
            return tiny_tokenizer.sentencepiece_like(tmp_path / "spm")
        case "with_bos":
            return tiny_tokenizer.byte_level(
                tmp_path / "bos", add_bos_token=True, add_eos_token=True
            )
    if not (DEMO / "tokenizer.json").is_file():
        pytest.skip("the demo model is not here")
    return DEMO


def test_same_ids_and_text_as_transformers(directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(directory))
    ours = Vocabulary("m", directory)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode_text(text) == ids
        for keep in (True, False):
            whole = theirs.decode(ids, skip_special_tokens=not keep)
            assert ours.decode(ids, keep_special_tokens=keep) == whole
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == expected
    assert ours.special_ids == set(theirs.all_special_ids) | ours.special_ids
    assert ours.vocab_size == len(theirs)


def test_hash_is_over_the_file(tmp_path):
    directory = tiny_tokenizer.byte_level(tmp_path)
    data = (directory / "tokenizer.json").read_bytes()
    expected = hashlib.sha256(data).hexdigest()[:16]
    assert Vocabulary("m", directory).tokenizer_hash == expected


def test_template_file_wins_over_the_config(tmp_path):
    directory = tiny_tokenizer.byte_level(tmp_path)
    (directory / "chat_template.jinja").write_text("{{ strftime_now('%Y') | length }}!")
    ours = Vocabulary("m", directory)
    assert ours.decode(ours.encode_chat(CHAT), keep_special_tokens=True) == "4!"


def test_template_refusal_and_bad_templates_are_the_callers_errors(tmp_path):
    ours = Vocabulary("m", tiny_tokenizer.byte_level(tmp_path / "a"))
    with pytest.raises(InvalidRequest, match="unknown role wizard"):
        ours.encode_chat([{"role": "wizard", "content": "x"}])
    bare = Vocabulary("m", tiny_tokenizer.byte_level(tmp_path / "b", chat_template=None))
    assert bare.chat_template is None
    with pytest.raises(InvalidRequest, match="no chat template"):
        bare.encode_chat(CHAT)
    with pytest.raises(InvalidRequest, match="does not compile"):
        Vocabulary("m", tiny_tokenizer.byte_level(tmp_path / "c", chat_template="{% if %}"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_template_cannot_leave_its_sandbox(tmp_path, source):
    ours = Vocabulary("m", tiny_tokenizer.byte_level(tmp_path, chat_template=source))
    with pytest.raises(InvalidRequest, match="refuses"):
        ours.encode_chat(CHAT)


def test_end_of_sequence_ids_come_from_the_generation_config_first(tmp_path):
    directory = tiny_tokenizer.byte_level(tmp_path)
    assert Vocabulary("m", directory).eos_token_ids == (0,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 0]}))
    assert Vocabulary("m", directory).eos_token_ids == (3, 0)


def test_ids_out_of_the_vocabulary_are_refused(tmp_path):
    ours = Vocabulary("m", tiny_tokenizer.byte_level(tmp_path))
    with pytest.raises(InvalidRequest, match="token id 312"):
        ours.decode([5, 312], keep_special_tokens=False)
    assert ours.token_bytes(4_000_000_000) == b""


def test_bad_directories_are_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"cannot read .*tokenizer\.json"):
        Vocabulary("m", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="is not a tokenizer"):
        Vocabulary("m", tmp_path)


def test_models_are_found_by_name(tmp_path):
    one = Vocabulary("one", tiny_tokenizer.byte_level(tmp_path / "a"))
    two = Vocabulary("two", tiny_tokenizer.byte_level(tmp_path / "b"))
    assert Vocabularies([one]).get("") is one
    both = Vocabularies([one, two])
    assert both.get("two") is two
    for name in ("", "three"):
        with pytest.raises(ModelNotFound, match="one, two"):
            both.get(name)


def test_model_paths():
    assert parse_models("/models/demo/") == {"demo": Path("/models/demo/")}
    assert parse_models("a=/x, b=/y") == {"a": Path("/x"), "b": Path("/y")}
    assert parse_models("a=/lr=0.1,/models/lr=0.2") == {
        "a": Path("/lr=0.1"),
        "lr=0.2": Path("/models/lr=0.2"),
    }
    assert parse_models(r"a\=1=/x\,y") == {"a=1": Path("/x,y")}
    for text in ("=x", "a=", "a=/x,a=/y"):
        with pytest.raises(ValueError, match=r"must look like|twice"):
            parse_models(text)

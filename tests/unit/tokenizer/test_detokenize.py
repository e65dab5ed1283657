from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import InvalidRequest
from baton.tokenizer.detokenize import Detokenizer, StopMatcher
from baton.tokenizer.vocabulary import Vocabulary
from tests.support import tiny_tokenizer

THOROUGH = settings(max_examples=150)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    with tempfile.TemporaryDirectory() as directory:
        return Vocabulary("m", tiny_tokenizer.byte_level(Path(directory)))


@pytest.fixture(scope="module")
def spm() -> Vocabulary:
    with tempfile.TemporaryDirectory() as directory:
        return Vocabulary("m", tiny_tokenizer.sentencepiece_like(Path(directory)))


def run(stream: Detokenizer, groups: list[list[int]]) -> tuple[list[str], str, int]:
    texts, num_tokens = [], 0
    for group in groups:
        piece = stream.add(group)
        texts.append(piece.text)
        num_tokens += piece.num_tokens
        if piece.stop:
            return texts, piece.stop, num_tokens
    piece = stream.add([], is_last=True)
    return [*texts, piece.text], piece.stop, num_tokens


@THOROUGH
@given(ids=st.lists(st.integers(0, 311), max_size=40), keep=st.booleans(), size=st.integers(1, 5))
def test_pieces_add_up_to_the_whole_decode(vocabulary, ids, keep, size):
    groups = [ids[start : start + size] for start in range(0, len(ids), size)]
    stream = Detokenizer(vocabulary, [], keep_special_tokens=keep)
    texts, stop, num_tokens = run(stream, groups)
    assert "".join(texts) == vocabulary.decode(ids, keep_special_tokens=keep)
    assert (stop, num_tokens) == ("", len(ids))


@THOROUGH
@given(text=st.text(max_size=40))
def test_pieces_of_real_text_hold_whole_characters_only(vocabulary, text):
    ids = vocabulary.encode_text(text)
    texts, _, _ = run(Detokenizer(vocabulary, [], keep_special_tokens=True), [[i] for i in ids])
    assert "".join(texts) == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in texts)


@THOROUGH
@given(text=st.text(alphabet="helo wrd,é日😀", max_size=30))
def test_vocabularies_with_space_marks_stream_too(spm, text):
    ids = spm.encode_text(text)
    texts, _, _ = run(Detokenizer(spm, [], keep_special_tokens=False), [[i] for i in ids])
    assert "".join(texts) == spm.decode(ids, keep_special_tokens=False)


@THOROUGH
@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_is_found_where_it_first_completes_however_the_text_is_cut(text, stops, cuts):
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    matcher, got, found = StopMatcher(stops), "", ""
    for start, end in pairwise(bounds):
        piece, found = matcher.add(text[start:end])
        got += piece
        assert not any(stop in got for stop in stops)
        if found:
            break
    else:
        got += matcher.end()
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (got, found) == (text, "")
    else:
        end, _, stop = min(ends)
        assert (got, found) == (text[: end - len(stop)], stop)


def test_stop_that_spans_tokens_ends_the_output_at_the_token_that_completes_it(vocabulary):
    ids = [i for character in "ab STOP now" for i in vocabulary.encode_text(character)]
    stream = Detokenizer(vocabulary, ["STOP"], keep_special_tokens=False)
    texts, stop, num_tokens = run(stream, [ids[:2], ids[2:5], ids[5:]])
    assert texts == ["ab", " ", ""]
    assert (stop, num_tokens) == ("STOP", 7)


def test_held_back_prefix_is_returned_when_it_was_no_stop(vocabulary):
    ids = vocabulary.encode_text("a ST")
    stream = Detokenizer(vocabulary, ["STOP"], keep_special_tokens=False)
    assert stream.add(ids).text == "a "
    assert stream.add([], is_last=True).text == "ST"


def test_incomplete_character_waits_and_is_replaced_at_the_end(vocabulary):
    one, two, *rest = [
        token_id
        for token_id in range(vocabulary.vocab_size)
        if len(vocabulary.token_bytes(token_id)) == 1
        and vocabulary.token_bytes(token_id) in (b"\xe2", b"\x82")
    ]
    assert not rest
    ids = sorted((one, two), key=vocabulary.token_bytes, reverse=True)
    stream = Detokenizer(vocabulary, [], keep_special_tokens=False)
    assert stream.add(ids).text == ""
    assert stream.add([], is_last=True).text == "\ufffd"


def test_special_tokens_are_left_out_unless_kept(vocabulary):
    ids = [*vocabulary.encode_text("hello"), 0]
    for keep, text in ((False, "hello"), (True, "hello<|endoftext|>")):
        stream = Detokenizer(vocabulary, [], keep_special_tokens=keep)
        assert stream.add(ids, is_last=True).text == text


def test_ids_that_have_no_token_have_no_text(vocabulary, spm):
    for one in (vocabulary, spm):
        ids = one.encode_text("hello")
        stream = Detokenizer(one, [], keep_special_tokens=False)
        assert stream.add([9_999, *ids, 9_999], is_last=True).text == "hello"


@pytest.mark.parametrize("stops", [[""], ["x" * 1025], ["x"] * 17])
def test_stops_are_checked(vocabulary, stops):
    with pytest.raises(InvalidRequest, match="stop must be"):
        Detokenizer(vocabulary, stops, keep_special_tokens=False)

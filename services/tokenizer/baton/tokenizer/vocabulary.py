"""A model's tokenizer, from the files beside its weights: text to ids, ids to text.

Gives the ids that transformers' AutoTokenizer gives, without torch or transformers. Thread-safe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer

from baton.core.errors import InvalidRequest, ModelNotFound
from baton.core.output import TokenText
from baton.tokenizer.chat_template import ChatTemplate

HASH_DIGITS = 16
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


def _byte_alphabet() -> Mapping[str, int]:
    """Characters that byte-level BPE writes bytes as. Source: GPT-2's `bytes_to_unicode`."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    table = {chr(byte): byte for byte in plain}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return MappingProxyType(table)


_BYTE_OF = _byte_alphabet()


class Vocabulary:
    """One model's tokenizer."""

    def __init__(self, name: str, directory: Path) -> None:
        """Reads the files of a model's directory.

        Raises:
            InvalidRequest: there is no usable `tokenizer.json`; the message says where.
        """
        self.name = name
        file = directory / "tokenizer.json"
        try:
            data = file.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(data)
        except OSError as error:
            raise InvalidRequest(f"cannot read {file}: {error.strerror}") from error
        except Exception as error:
            raise InvalidRequest(f"{file} is not a tokenizer: {error}") from error
        self.tokenizer_hash = hashlib.sha256(data).hexdigest()[:HASH_DIGITS]
        config = _read_json(directory / "tokenizer_config.json")
        named = _named_tokens(config)
        self._prepare(config, named)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = self._eos_token_ids(directory, named)
        source = _template_source(directory, config)
        self.chat_template = ChatTemplate(source, named) if source else None
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        self.is_byte_level: bool = decoder.get("type") == "ByteLevel"
        """True when a token's bytes do not depend on its neighbours."""
        self._bytes_cache: dict[int, bytes] = {}

    def encode_text(self, text: str) -> list[int]:
        """Token ids with the model's own leading special tokens. Releases the GIL."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation with its generation prompt.

        `tools` are those that the model may call; a template may not know them.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                f"the model {self.name} has no chat template; send a text prompt instead"
            )
        return self._encode(self.chat_template.render(messages, tools), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool) -> str:
        """Text of token ids; incomplete UTF-8 is replaced.

        Raises:
            InvalidRequest: an id is not in the vocabulary.
        """
        self.check_ids(token_ids)
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)

    def text_of(self, token_ids: list[int]) -> str:
        """Text of token ids, special ones too; an id without a token adds nothing."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Checks that the vocabulary has the ids.

        Raises:
            InvalidRequest: it lacks one.
        """
        for token_id in token_ids:
            if token_id >= self.vocab_size and self._tokenizer.id_to_token(token_id) is None:
                raise InvalidRequest(
                    f"token id {token_id} is not in the vocabulary of {self.vocab_size} tokens"
                )

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token by itself; empty for an id without a token."""
        known = self._bytes_cache.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:
                return b""
            known = self._bytes_cache[token_id] = self._make_bytes(token)
        return known

    def describe(self, token_id: int) -> TokenText:
        """One token's bytes and text."""
        token_bytes = self.token_bytes(token_id)
        return TokenText(token_bytes, token_bytes.decode("utf-8", "replace"))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # encode_batch_fast, because `encode` keeps the GIL (tokenizers 0.23).
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return list(encoding.ids)

    def _make_bytes(self, token: str) -> bytes:
        if self.is_byte_level:
            if all(character in _BYTE_OF for character in token):
                return bytes(_BYTE_OF[character] for character in token)
            return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def _prepare(self, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
        """Does what transformers does after loading: no truncation, and named tokens are special.

        `add_bos_token` and `add_eos_token` are left alone: beside a `tokenizer.json`, whose own
        post-processor decides, transformers 5 ignores them.
        """
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
        listed = extra.values() if isinstance(extra, Mapping) else extra
        contents = [*named.values(), *filter(None, map(_content, listed))]
        known = [text for text in contents if self._tokenizer.token_to_id(text) is not None]
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        self._tokenizer.add_special_tokens([
            AddedToken(text, normalized=False, special=True)
            for text in dict.fromkeys(known)
            if text not in special
        ])

    def _eos_token_ids(self, directory: Path, named: Mapping[str, str]) -> tuple[int, ...]:
        for file in ("generation_config.json", "config.json"):
            value = _read_json(directory / file).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (int(value),)
        token_id = self._tokenizer.token_to_id(named.get("eos_token", ""))
        return () if token_id is None else (token_id,)


class Vocabularies:
    """The tokenizers that a process serves, by model name."""

    def __init__(self, vocabularies: Sequence[Vocabulary] = ()) -> None:
        self._by_name = {vocabulary.name: vocabulary for vocabulary in vocabularies}

    def add(self, vocabulary: Vocabulary) -> None:
        """Serves one more."""
        self._by_name[vocabulary.name] = vocabulary

    def __iter__(self) -> Iterator[Vocabulary]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Vocabulary:
        """The tokenizer of a model; an empty name takes the only one.

        Raises:
            ModelNotFound: there is none, or the name is empty and there are several.
        """
        if not name and len(self._by_name) == 1:
            return next(iter(self._by_name.values()))
        found = self._by_name.get(name)
        if found is None:
            names = ", ".join(sorted(self._by_name)) or "none"
            raise ModelNotFound(f"no tokenizer for the model {name!r}; known here: {names}")
        return found


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise InvalidRequest(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{file} must hold an object")
    return value


def _content(token: object) -> str:
    """Text of a token as written in tokenizer_config.json: a string, or an object with one."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: _content(config.get(name)) for name in _NAMED_TOKENS}
    return {name: text for name, text in texts.items() if text}


def _template_source(directory: Path, config: Mapping[str, Any]) -> str:
    """`chat_template.jinja` wins over the config; of several named templates, "default"."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template", "") for entry in template}
        template = by_name.get("default", "")
    return template if isinstance(template, str) else ""

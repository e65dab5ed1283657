"""Small tokenizers in Hugging Face's format, built on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = ["hello world, wörld and hallo 😀😃 日本語 import os\n    return x" * 20]
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim }}"
    "{% generation %}{{ eos_token if message['role'] == 'assistant' }}{% endgeneration %}\n"
    "{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}{{ {'a': 'ü'} | tojson }}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def byte_level(directory: Path, **config: Any) -> Path:
    """A byte-level BPE vocabulary of 312 tokens, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=312,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _save(tokenizer, directory, config)


def sentencepiece_like(directory: Path, **config: Any) -> Path:
    """A Llama-2-like vocabulary: a mark for spaces, byte fallback, a leading <s>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"helowrd,", "he", "hel", "hell", "hello", "\u2581hello", "\u2581w"]
    merges = [
        ("h", "e"), ("he", "l"), ("hel", "l"), ("hell", "o"), ("\u2581", "hello"), ("\u2581", "w"),
    ]  # fmt: skip
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("\u2581"),
        normalizers.Replace(" ", "\u2581"),
    ])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return _save(tokenizer, directory, {"bos_token": "<s>", "eos_token": "</s>", **config})


def _save(tokenizer: Tokenizer, directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    whole = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(whole))
    return directory

"""Train the pair's byte-level BPE tokenizer; save it in Hugging Face format."""

import argparse
import json
import sys
from pathlib import Path

import corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, SYSTEM, USER, ASSISTANT = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [END, SYSTEM, USER, ASSISTANT]
END_ID = 0
"""Starts every document, ends every answer, pads every batch."""
VOCAB_SIZE = 4096

WORD_PATTERN = (
    r"\r?\n[ \t]*"  # a line break and the next line's indentation are one token
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[ \t]+(?![^\s])|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    """Learn the merges; every byte is in the alphabet, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train on the training files only, and say how well it packs the held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory to write the tokenizer to")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="default: %(default)s")
    arguments = parser.parse_args()
    parts = corpus.split(corpus.stdlib_files())
    tokenizer = train([file.text for file in parts.train], arguments.vocab_size)
    save(tokenizer, arguments.output)
    num_tokens = sum(len(tokenizer.encode(file.text).ids) for file in parts.heldout)
    num_bytes = sum(file.num_bytes for file in parts.heldout)
    sys.stdout.write(f"held out: {num_bytes / num_tokens:.2f} bytes per token\n")


if __name__ == "__main__":
    main()

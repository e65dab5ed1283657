"""Measure the pair on the held-out files: bits per byte against `xz -9`, and draft acceptance.

Prints a table and, as the last line, the same figures as JSON. Files that this Python has with
other content than when the split was made are left out and counted.
"""

import argparse
import json
import lzma
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import corpus
import torch
from tokenizer import END_ID
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

MODELS_DIR = Path(__file__).parent.parent
NUM_DRAFT_TOKENS = 4
PREFIX_TOKENS, CONTINUATION_TOKENS = 192, 64
CONTEXT_OVERLAP = 1024
"""From its second window on, a long file's tokens have at least this many before them."""


class Tally:
    """Sums over the files scored so far."""

    def __init__(self) -> None:
        """Start from nothing."""
        self.target_nats = self.draft_nats = 0.0
        self.num_tokens = self.num_agreed = 0

    @torch.inference_mode()
    def add_file(self, ids: list[int], target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
        """Score each token of a file and its end token exactly once, in overlapping windows."""
        ids = [END_ID, *ids, END_ID]
        context = target.config.max_position_embeddings
        scored = 1
        while scored < len(ids):
            begin = max(0, scored - CONTEXT_OVERLAP) if scored > 1 else 0
            window = torch.tensor(ids[begin : begin + context])
            fresh = slice(scored - begin - 1, len(window) - 1)
            labels = window[1:][fresh]
            wanted = target(input_ids=window[None]).logits[0, :-1][fresh]
            given = draft(input_ids=window[None]).logits[0, :-1][fresh]
            self.target_nats += functional.cross_entropy(wanted, labels, reduction="sum").item()
            self.draft_nats += functional.cross_entropy(given, labels, reduction="sum").item()
            self.num_agreed += int((wanted.argmax(-1) == given.argmax(-1)).sum())
            self.num_tokens += len(labels)
            scored = begin + len(window)


def xz_bits_per_byte(texts: Sequence[bytes]) -> float:
    """Return the size of `xz -9` of the texts, each by itself, in bits per byte of text."""
    packed = sum(len(lzma.compress(text, preset=9)) for text in texts)
    return 8 * packed / sum(map(len, texts))


@torch.inference_mode()
def greedy_acceptance(
    prefixes: list[list[int]], target: LlamaForCausalLM, draft: LlamaForCausalLM
) -> tuple[float, float]:
    """Follow the target's greedy continuations; return agreement and tokens accepted per round.

    A round proposes `NUM_DRAFT_TOKENS`; those before the first disagreement are accepted and the
    target adds one. As an accepted token is the target's own, scoring the finished text once gives
    the same rounds as running them.
    """
    if not prefixes:
        return math.nan, math.nan
    text = target.generate(
        torch.tensor(prefixes),
        attention_mask=torch.ones(len(prefixes), PREFIX_TOKENS, dtype=torch.int64),
        do_sample=False,
        min_new_tokens=CONTINUATION_TOKENS,
        max_new_tokens=CONTINUATION_TOKENS,
    )
    proposed = draft(input_ids=text).logits[:, PREFIX_TOKENS - 1 : -1].argmax(-1)
    agreed = (proposed == text[:, PREFIX_TOKENS:]).tolist()
    num_accepted = num_rounds = 0
    for row in agreed:
        position = 0
        while position + NUM_DRAFT_TOKENS < len(row):
            proposal = row[position : position + NUM_DRAFT_TOKENS]
            accepted = [*proposal, False].index(False)
            num_accepted, num_rounds = num_accepted + accepted, num_rounds + 1
            position += accepted + 1
    return sum(map(sum, agreed)) / sum(map(len, agreed)), num_accepted / num_rounds


def evaluate(target_dir: Path, draft_dir: Path, max_files: int | None) -> dict[str, float]:
    """Load the pair in float32 and measure it on the first `max_files` held-out files, or all."""
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    draft = AutoModelForCausalLM.from_pretrained(draft_dir, dtype=torch.float32).eval()
    listed = json.loads(corpus.HELDOUT_LIST.read_text())["files"]
    available = corpus.heldout_files()
    files = available[:max_files]
    texts = [file.text.encode() for file in files]
    encoded = [tokenizer.backend_tokenizer.encode(file.text).ids for file in files]
    tally = Tally()
    for number, ids in enumerate(encoded, start=1):
        tally.add_file(ids, target, draft)
        sys.stderr.write(f"\rfile {number} of {len(files)}")
    sys.stderr.write("\n")
    prefixes = [
        [END_ID, *ids[: PREFIX_TOKENS - 1]] for ids in encoded if len(ids) >= PREFIX_TOKENS
    ] + [ids[len(ids) // 2 :][:PREFIX_TOKENS] for ids in encoded if len(ids) >= 2 * PREFIX_TOKENS]
    on_greedy_text, accepted_per_round = greedy_acceptance(prefixes, target, draft)
    num_bytes = sum(map(len, texts))
    bits = 1 / math.log(2) / num_bytes
    return {
        "num_files": len(files),
        "num_files_left_out": len(listed) - len(available),
        "num_bytes": num_bytes,
        "bytes_per_token": num_bytes / tally.num_tokens,
        "target_nats_per_token": tally.target_nats / tally.num_tokens,
        "target_bits_per_byte": tally.target_nats * bits,
        "draft_bits_per_byte": tally.draft_nats * bits,
        "xz_9_each_file_bits_per_byte": xz_bits_per_byte(texts),
        "xz_9_concatenated_bits_per_byte": xz_bits_per_byte([b"".join(texts)]),
        "agreement_on_heldout_text": tally.num_agreed / tally.num_tokens,
        "agreement_on_greedy_text": on_greedy_text,
        f"accepted_of_{NUM_DRAFT_TOKENS}_draft_tokens": accepted_per_round,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=MODELS_DIR / "demo")
    parser.add_argument("--draft", type=Path, default=MODELS_DIR / "demo-draft")
    parser.add_argument("--max-files", type=int, help="measure only on the first files")
    arguments = parser.parse_args()
    figures = evaluate(arguments.target, arguments.draft, arguments.max_files)
    for name, value in figures.items():
        shown = f"{value:12,}" if isinstance(value, int) else f"{value:12.4f}"
        sys.stdout.write(f"{name.replace('_', ' '):34} {shown}\n")
    rounded = {name: round(value, 4) for name, value in figures.items()}
    sys.stdout.write(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()

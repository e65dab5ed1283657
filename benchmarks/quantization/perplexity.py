"""What rounding costs in quality: perplexity on text that the demo model was not trained on."""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedModel

from baton.engine.quantize import Quantization
from baton.engine.quantize_model import WeightSource, load_weights

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "models" / "demo"
HELDOUT_LIST = DEMO.parent / "recipe" / "heldout.json"
WINDOW_TOKENS = 1024


def heldout_texts(max_files: int | None = None) -> list[str]:
    """The held-out modules of the standard library that this Python has unchanged."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for entry in json.loads(HELDOUT_LIST.read_text(encoding="utf-8"))["files"]:
        path = root / entry["path"]
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() == entry["sha256"]:
            texts.append(content.decode())
    return texts[:max_files]


def make_windows(directory: Path, texts: Sequence[str]) -> list[torch.Tensor]:
    """Texts as token ids, cut into windows of at most WINDOW_TOKENS, int64 [1, num_tokens] each."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    windows: list[torch.Tensor] = []
    for text in texts:
        ids = [int(config["bos_token_id"]), *tokenizer.encode(text).ids]
        windows += [
            torch.tensor([ids[start : start + WINDOW_TOKENS]])
            for start in range(0, len(ids) - 1, WINDOW_TOKENS)
        ]
    return windows


@torch.inference_mode()
def perplexity(module: PreTrainedModel, windows: Sequence[torch.Tensor]) -> float:
    """The mean loss per token as a power of e; a window's first token is given."""
    nats, num_tokens = 0.0, 0
    for window in windows:
        logits = module(input_ids=window, use_cache=False).logits[0, :-1].float()
        nats += float(cross_entropy(logits, window[0, 1:], reduction="sum"))
        num_tokens += window.shape[1] - 1
    return math.exp(nats / num_tokens)


def load(directory: Path, quantization: Quantization | None = None) -> PreTrainedModel:
    """A model as the engine loads it, with transformers' own attention."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    source = WeightSource(directory, config, "sdpa", torch.device("cpu"))
    return load_weights(source, None, quantization, lambda _fraction, _text: None)


def perplexity_change(quantization: Quantization, max_files: int | None = None) -> float:
    """How much worse the demo model becomes: 0.01 is one per cent more perplexity."""
    windows = make_windows(DEMO, heldout_texts(max_files))
    return perplexity(load(DEMO, quantization), windows) / perplexity(load(DEMO), windows) - 1

"""The identity of what computes KV: two engines exchange KV only if these are equal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from baton.core.hashing import Fingerprint, KvLayout

_HEX_DIGITS = 16
_SAMPLE_BYTES = 1 << 16
_NUM_SAMPLES = 16

_IRRELEVANT = frozenset({
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
})
"""Settings that leave KV as it is (the dtype is a part of the layout)."""


def make_fingerprint(
    name: str, directory: Path, config: Mapping[str, Any], layout: KvLayout
) -> Fingerprint:
    """Reads the model's directory. Costs milliseconds, whatever the model's size."""
    return Fingerprint(
        model=name,
        config_hash=config_hash(config),
        weights_hash=_quantized_hash(weights_hash(directory), config.get("quantization_config")),
        tokenizer_hash=tokenizer_hash(directory),
        layout=layout,
    )


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of the settings that decide KV content."""
    relevant = {
        key: value
        for key, value in config.items()
        if key not in _IRRELEVANT and not key.startswith("_")
    }
    text = json.dumps(relevant, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:_HEX_DIGITS]


def weights_hash(directory: Path) -> str:
    """Hash of the safetensors files' names, sizes and evenly spread samples of their content."""
    digest = sha256()
    for path in sorted(directory.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name}\0{num_bytes}\0".encode())
        with path.open("rb") as file:
            for index in range(_NUM_SAMPLES):
                last_start = max(0, num_bytes - _SAMPLE_BYTES)
                file.seek(last_start * index // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:_HEX_DIGITS]


def _quantized_hash(plain_hash: str, quantization: object) -> str:
    """Hash of weights that may be rounded on loading."""
    if quantization is None:
        return plain_hash
    text = plain_hash + json.dumps(quantization, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:_HEX_DIGITS]


def tokenizer_hash(directory: Path) -> str:
    """Hash of tokenizer.json; empty if there is none."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return ""
    return sha256(path.read_bytes()).hexdigest()[:_HEX_DIGITS]

"""Weights are in memory once: mapped as they lie in the file, or packed, layer by layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_models import save_byte_tokenizer

_LOAD = """
import json, sys
import torch, transformers
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine

def anonymous_bytes():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) << 10

path, settings = sys.argv[1], json.loads(sys.argv[2])
torch.ones(64, 64) @ torch.ones(64, 64)
before = anonymous_bytes()
engine = Engine(EngineConfig(path, "m", num_blocks=4, num_threads=1, **settings))
print(anonymous_bytes() - before)
"""


def _make_model(kind: str, directory: Path) -> Path:
    is_mixture = kind == "mixtral"
    config = AutoConfig.for_model(
        kind,
        hidden_size=768,
        intermediate_size=512 if is_mixture else 2048,
        num_local_experts=6,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=320,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    save_byte_tokenizer(directory, 320)
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
@pytest.mark.parametrize(
    ("kind", "settings", "most_copies"),
    [
        ("llama", {"prepack_linears": False}, 0.4),
        ("llama", {}, 1.4),
        ("llama", {"quantization": "int8"}, 1.0),
        # transformers puts the experts of such files together, so these are never mapped.
        ("mixtral", {}, 1.4),
        ("mixtral", {"quantization": "int8"}, 1.0),
    ],
)
def test_there_is_one_copy(
    tmp_path: Path, kind: str, settings: dict[str, object], most_copies: float
) -> None:
    model_path = _make_model(kind, tmp_path)
    weights = sum(path.stat().st_size for path in model_path.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(model_path), json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert weights > 100 << 20
    assert int(done.stdout.split()[-1]) < most_copies * weights

"""The shapes of the target and the draft, and how their weights reach a directory."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizer import END_ID, VOCAB_SIZE
from transformers import LlamaConfig, LlamaForCausalLM

MAX_CONTEXT = 2048
HEAD_DIM = 64


def llama_config(
    hidden_size: int, intermediate_size: int, num_layers: int, num_kv_heads: int
) -> LlamaConfig:
    """Describe a Llama-shaped model with tied embeddings over the pair's vocabulary."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def target_config() -> LlamaConfig:
    """Describe the target: 9.4 million parameters."""
    return llama_config(hidden_size=384, intermediate_size=1024, num_layers=5, num_kv_heads=2)


def draft_config() -> LlamaConfig:
    """Describe the draft: 3.5 million parameters, two fifths of them the embedding."""
    return llama_config(hidden_size=384, intermediate_size=512, num_layers=2, num_kv_heads=2)


def build(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Make a model with random float32 weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


def export(weights: dict[str, torch.Tensor], config: LlamaConfig, directory: Path) -> None:
    """Write configs and bf16 weights, each file replaced at once, so that readers see no half."""
    directory.mkdir(parents=True, exist_ok=True)
    saved = LlamaConfig(**{**config.to_dict(), "dtype": torch.bfloat16, "use_cache": True})
    _replace(directory / "config.json", saved.to_json_string(use_diff=True).encode())
    generation = {"bos_token_id": END_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}
    content = json.dumps(generation, indent=2) + "\n"
    _replace(directory / "generation_config.json", content.encode())
    tensors = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in weights.items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    part = directory / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(directory / "model.safetensors")


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)

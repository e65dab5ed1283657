"""Tiny random models in the format of real ones: config, safetensors weights, byte-level tokenizer.

Default initialisation makes a model that repeats one token for ever, which proves nothing: weights
here are drawn wide and embeddings are untied, so that greedy outputs vary.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

EOS = "<|endoftext|>"
SPECIAL_TOKENS = (EOS, "<|im_start|>", "<|im_end|>")
NUM_BYTES = 256
EOS_TOKEN_ID = NUM_BYTES
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
}
"""Multi-head latent attention: keys of 24, values of 16."""
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 24, "head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 6,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
    },
    "phi3": {"pad_token_id": 0},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
    "gpt2": {},
    "smollm3": {"pad_token_id": 0},
    "olmo2": {},
    "olmo3": {"sliding_window": 24},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    # Nobody asked for the rest by name.
    "cohere": {},
    "cohere2": {"sliding_window": 24},
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "deepseek_v3": _MLA,
    "ernie4_5": {},
    "exaone4": {"sliding_window": 24},
    "glm4": {"pad_token_id": 0, "head_dim": 16},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "minimax_m2": {},
    "modernbert-decoder": {"pad_token_id": 0, "local_attention": 24},
    "nemotron": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {},
    "phi": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "seed_oss": {},
    "starcoder2": {"sliding_window": 24},
    # Cannot be served.
    "bert": {},
    "diffllama": {},
}
KINDS = tuple(_KINDS)


def make_tiny_model(kind: str, directory: Path, *, seed: int = 0, vocab_size: int = 320) -> Path:
    """Saves a model of an architecture (one of KINDS) with its tokenizer; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        kind,
        **{**_COMMON, **_KINDS[kind]},
        vocab_size=vocab_size,
        eos_token_id=EOS_TOKEN_ID,
        bos_token_id=EOS_TOKEN_ID,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    save_byte_tokenizer(directory, vocab_size)
    return directory


def save_byte_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer in which every id of the vocabulary has a text."""
    vocab = {
        character: index
        for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    for token in SPECIAL_TOKENS:
        vocab[token] = len(vocab)
    pairs = itertools.product(string.ascii_lowercase, string.ascii_lowercase)
    merges = list(itertools.islice(pairs, vocab_size - len(vocab)))
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def load_reference(directory: Path) -> PreTrainedModel:
    """The model as transformers runs it, in float32 with eager attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    return model.eval()


def reference_greedy(
    model: PreTrainedModel, prompt: Sequence[int], num_tokens: int
) -> tuple[int, ...]:
    """`num_tokens` greedy tokens by transformers.generate; end-of-sequence tokens do not end it."""
    config = model.generation_config
    config.eos_token_id = None
    config.pad_token_id = 0
    input_ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
    return tuple(output[0, len(prompt) :].tolist())


def config_of(directory: Path) -> PreTrainedConfig:
    """The saved configuration."""
    return AutoConfig.from_pretrained(directory, local_files_only=True)

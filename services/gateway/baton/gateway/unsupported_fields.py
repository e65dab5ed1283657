"""Request fields of other servers that Baton refuses rather than ignores.

Ignoring one of these would change the meaning of the answer. Unknown fields that only tune,
identify or bill a request are ignored. docs/compatibility.md lists both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from baton.client import InvalidRequest

REFUSED = frozenset({
    # OpenAI
    "audio", "echo", "function_call", "functions", "prediction", "suffix", "web_search_options",
    # vLLM
    "allowed_token_ids", "bad_words", "chat_template", "chat_template_kwargs",
    "continue_final_message", "disable_additional_properties", "disable_any_whitespace",
    "documents", "guided_whitespace_pattern", "include_stop_str_in_output", "logits_processors",
    "prompt_embeds", "return_tokens_as_token_ids", "structural_tag", "thinking_token_budget",
    "truncate_prompt_tokens", "use_beam_search", "whitespace_pattern",
    # SGLang
    "custom_logit_processor", "custom_params", "ebnf", "json_schema", "lora_path",
    "max_new_tokens", "min_new_tokens", "no_stop_trim", "regex", "return_hidden_states",
    "session_params", "stop_regex",
    # llama.cpp
    "dry_multiplier", "dynatemp_range", "grammar", "lora", "mirostat", "n_keep", "n_predict",
    "n_probs", "repeat_penalty", "samplers", "top_n_sigma", "typical_p", "xtc_probability",
    # Text Generation Inference, Ollama, OpenRouter, Cohere, Mistral
    "adapter_id", "decoder_input_details", "do_sample", "format", "input_type", "instruction",
    "logprob_token_ids", "options", "partial", "prefix", "raw", "system", "template", "think",
    "top_a", "top_n_tokens", "truncate", "watermark",
})  # fmt: skip
INSTEAD = MappingProxyType({
    **dict.fromkeys(("functions", "function_call"), "use tools"),
    **dict.fromkeys(("max_new_tokens", "n_predict"), "use max_tokens"),
    **dict.fromkeys(("ebnf", "grammar", "json_schema", "regex"), "use structured_outputs"),
    "min_new_tokens": "use min_tokens",
    "repeat_penalty": "use repetition_penalty",
})
"""What to use instead, where Baton has it under another name."""


def refuse_unsupported(body: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """Refuses a body with a field that Baton does not have and must not ignore.

    A field that is null, false, 0 or empty asks for nothing and passes.

    Raises:
        InvalidRequest: names the field, after `where`.
    """
    for name in sorted(REFUSED & body.keys()):
        if body[name] and name not in known:
            advice = INSTEAD.get(name, "leave it out")
            raise InvalidRequest(f"{where}{name} is not supported; {advice}")

"""Keys of answers: all that decides an answer is in them, and nothing else."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from baton.core.answer_key import KEY_BYTES, UNIMPORTANT, answer_key, is_determined
from baton.core.guide import Guide
from baton.core.sampling import DraftSource, SamplingParams

BASE = SamplingParams(temperature=0.7, seed=3, max_tokens=9)
OTHER_VALUES: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "logit_bias": {5: 1.0},
    "max_tokens": 10,
    "min_tokens": 1,
    "stop": ("x",),
    "stop_token_ids": (7,),
    "ignore_eos": True,
    "seed": 4,
    "logprobs": True,
    "top_logprobs": 2,
    "prompt_logprobs": 1,
    "guide": Guide.regex("a+"),
}


def key(sampling: SamplingParams = BASE, **change: Any) -> bytes:
    given = {
        "fingerprint_digest": b"f" * 16,
        "cache_salt": "tenant",
        "token_ids": (1, 2, 3),
        "keep_special_tokens": False,
        **change,
    }
    return answer_key(sampling=sampling, **given)


def test_same_request_has_the_same_key() -> None:
    assert key() == key(replace(BASE))
    assert len(key()) == KEY_BYTES
    assert key(replace(BASE, logit_bias={1: 2.0, 3: 4.0})) == key(
        replace(BASE, logit_bias={3: 4.0, 1: 2.0})
    )


@pytest.mark.parametrize(
    "name", [f.name for f in fields(SamplingParams) if f.name not in UNIMPORTANT]
)
def test_every_sampling_setting_is_in_the_key(name: str) -> None:
    assert name in OTHER_VALUES, "a new setting: say here how it changes"
    assert key(replace(BASE, **{name: OTHER_VALUES[name]})) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint_digest": b"g" * 16},
        {"cache_salt": "other"},
        {"cache_salt": ""},
        {"token_ids": (1, 2)},
        {"token_ids": (1, 2, 4)},
        {"keep_special_tokens": True},
    ],
)
def test_model_tenant_and_prompt_are_in_the_key(change: dict[str, Any]) -> None:
    assert key(**change) != key()


def test_what_a_text_ends_with_cannot_be_told_as_another_request() -> None:
    assert key(cache_salt="a", token_ids=(0,)) != key(cache_salt="a\0\0\0\0", token_ids=())


def test_guides_of_another_kind_differ() -> None:
    assert key(replace(BASE, guide=Guide.regex("x"))) != key(replace(BASE, guide=Guide.lark("x")))


def test_seed_counts_only_where_there_is_noise() -> None:
    greedy = replace(BASE, temperature=0.0)
    assert key(greedy) == key(replace(greedy, seed=99))


def test_answers_are_determined_by_a_seed_or_without_noise() -> None:
    assert is_determined(SamplingParams(temperature=0.0))
    assert is_determined(SamplingParams(seed=1))
    assert not is_determined(SamplingParams(temperature=0.5))


def test_how_drafts_are_made_is_not_in_the_key() -> None:
    assert {"speculation", "draft_source"} == UNIMPORTANT
    drafted = replace(BASE, speculation=not BASE.speculation, draft_source=DraftSource(1))
    assert key(drafted) == key()

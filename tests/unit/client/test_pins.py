"""Pins in the SDK: what goes out and what comes back."""

from __future__ import annotations

from typing import Any

import pytest

from baton.client import PinnedPrefix
from baton.client.arguments import pin_request
from baton.core.errors import InvalidRequest
from baton.v1 import common_pb2
from baton.wire.inference.pins import pin_from_pb, pin_request_to_pb


def test_request_says_what_was_asked_for() -> None:
    request = pin_request_to_pb(
        pin_request("You are", {"model": "m", "cache_salt": "s", "label": "system", "ttl_s": 1.5})
    )
    assert (request.text, request.model, request.cache_salt) == ("You are", "m", "s")
    assert (request.label, request.ttl.ToMilliseconds()) == ("system", 1500)
    assert not pin_request_to_pb(pin_request("x", {})).HasField("ttl")


def test_conversation_and_token_ids_are_prompts_too() -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    chat = pin_request_to_pb(pin_request(None, {"messages": messages})).chat
    assert chat.messages[0].content == "Be brief."
    tokens = pin_request_to_pb(pin_request(None, {"token_ids": [1, 2]})).tokens
    assert list(tokens.token_ids) == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {}),
        ("x", {"token_ids": [1]}),
        ("x", {"ttl_s": float("inf")}),
        ("x", {"label": 7}),
    ],
)
def test_bad_values_are_refused_before_a_call(prompt: str | None, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        pin_request_to_pb(pin_request(prompt, options))  # type: ignore[arg-type]


def test_pin_comes_back_as_plain_values() -> None:
    pin = common_pb2.Pin(pin_id="ab", label="l", num_blocks=3, num_stored_blocks=2, bytes=99)
    pin.remaining.FromMilliseconds(2500)
    assert pin_from_pb(pin) == PinnedPrefix("ab", "l", 3, 2, 99, 2.5)

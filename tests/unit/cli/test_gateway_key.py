from __future__ import annotations

import os

import pytest

from baton.cli.up import share_gateway_key
from baton.client.connection import default_api_key

LOCAL = "127.0.0.1:50051"
NAMES = ("BATON_API_KEY", "BATON_API_KEYS", "BATON_GATEWAY_KEY", "BATON_TENANTS_FILE")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def test_without_tenants_there_is_no_key() -> None:
    share_gateway_key()
    assert "BATON_GATEWAY_KEY" not in os.environ
    assert default_api_key(LOCAL) is None


@pytest.mark.parametrize("name", ["BATON_API_KEYS", "BATON_TENANTS_FILE"])
def test_tenants_give_the_local_system_a_key_that_its_starter_uses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    share_gateway_key()
    assert len(os.environ["BATON_GATEWAY_KEY"]) > 20
    assert default_api_key(LOCAL) == os.environ["BATON_GATEWAY_KEY"]


def test_keys_that_are_given_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_API_KEYS", "x")
    monkeypatch.setenv("BATON_GATEWAY_KEY", "given")
    share_gateway_key()
    assert default_api_key(LOCAL) == "given"
    monkeypatch.setenv("BATON_API_KEY", "own")
    assert default_api_key(LOCAL) == "own"


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        *((local, True) for local in ("localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1")),
        *((remote, False) for remote in ("10.0.0.1:1", "scheduler:1", "127.0.0.1.evil:1")),
        *((remote, False) for remote in ("localhost.evil:1", "dns:///localhost:1")),
    ],
)
def test_the_gateways_key_goes_to_this_machine_only(
    address: str, *, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_GATEWAY_KEY", "speaks for all tenants")
    assert bool(default_api_key(address)) is is_local
    monkeypatch.setenv("BATON_API_KEY", "own")
    assert default_api_key(address) == "own"

from __future__ import annotations

import socket

import pytest

from baton.rpc.server import advertised_host
from baton.rpc.settings import ServiceSettings

TOWARDS_BROKER = "10.0.0.7"


class _Probe(socket.socket):
    def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        if address[0] != "broker":
            raise OSError("no way there")

    def getsockname(self) -> tuple[str, int]:
        return TOWARDS_BROKER, 1


def _settings(host: str = "0.0.0.0", advertise: str = "", nats: str = "broker") -> ServiceSettings:
    url = f"nats://{nats}:4222,nats://other:4222"
    return ServiceSettings(host=host, advertise_host=advertise, nats_url=url)


@pytest.mark.parametrize("own", ["10.0.0.5", "127.0.1.1", None])
def test_others_are_told_an_address_that_they_can_reach(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(_name: str) -> str:
        if own is None:
            raise OSError("unknown name")
        return own

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(socket, "socket", _Probe)
    assert advertised_host(_settings(advertise="me")) == "me"
    assert advertised_host(_settings(host="10.0.0.9")) == "10.0.0.9"
    assert advertised_host(_settings()) == ("10.0.0.5" if own == "10.0.0.5" else TOWARDS_BROKER)
    if own != "10.0.0.5":
        assert advertised_host(_settings(nats="elsewhere")) == "127.0.0.1"

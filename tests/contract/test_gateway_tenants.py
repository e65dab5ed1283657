"""API keys, tenants and their limits, as a caller of the gateway sees them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import openai
import pytest
from pydantic import ValidationError

from baton.client import Unauthenticated
from baton.gateway.settings import GatewaySettings
from baton.rpc.tenants import RateLimited, TenantEntry, Tenants
from tests.support.gateway_rig import running_gateway

KEYS = "secret-a1=acme,secret-a2=acme,secret=b1=globex"
OPEN = frozenset({
    *("/health", "/ready", "/version", "/openapi.json"),
    *("/console", "/console/{name}"),
})
"""Whoever may come to the port."""
BODY = {"prompt": "x", "cache_salt": "s"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_without_a_known_key_nothing_is_served_but_health():
    async with running_gateway(api_keys=KEYS) as edge:
        for headers in ({}, bearer("wrong"), {"authorization": "Basic secret-a1"}):
            for route in edge.gateway.routes():
                if route.path in OPEN:
                    continue
                method = "POST" if "POST" in (route.methods or ()) else "GET"
                path = re.sub("{[^}]*}", "demo", route.path)
                response = await edge.raw.request(method, path, headers=headers)
                assert response.status_code == 401, path
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
                assert "secret" not in response.text
        assert not edge.fake.requests
        for path in ("/health", "/ready", "/version", "/openapi.json", "/console"):
            assert (await edge.raw.get(path)).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            await edge.client.models.list()
        known = edge.client.with_options(api_key="secret-a2")
        assert [model.id for model in (await known.models.list()).data] == ["demo"]


async def test_tenants_do_not_share_kv_and_keys_of_one_tenant_do():
    async with running_gateway(api_keys=KEYS) as edge:
        for key in ("secret-a1", "secret-a2", "secret=b1"):
            response = await edge.raw.post("/v1/completions", json=BODY, headers=bearer(key))
            assert response.status_code == 200
        salts = [request.cache_salt for request in edge.fake.requests]
        assert salts == ["acme:s", "acme:s", "globex:s"]


async def test_without_tenants_everybody_may_call():
    async with running_gateway() as edge:
        assert (await edge.raw.post("/v1/completions", json=BODY)).status_code == 200
        assert edge.fake.requests[0].cache_salt == "s"


async def test_a_tenant_that_comes_too_often_is_told_when_to_come_back(tmp_path):
    file = tmp_path / "tenants.json"
    acme = {"name": "acme", "keys": ["secret-a"], "requests_per_s": 0.001, "burst": 2}
    file.write_text(json.dumps({"tenants": [acme, {"name": "globex", "keys": ["secret-b"]}]}))
    async with running_gateway(tenants_file=file) as edge:
        for expected in (200, 200, 429, 429):
            response = await edge.raw.post("/v1/completions", json=BODY, headers=bearer("secret-a"))
            assert response.status_code == expected
        assert 900 < int(response.headers["retry-after"]) <= 1000
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert len(edge.fake.requests) == 2
        for _ in range(5):
            response = await edge.raw.get("/v1/models", headers=bearer("secret-b"))
            assert response.status_code == 200


def test_a_limit_goes_by_the_clock_and_counts_known_keys_only():
    tenants = Tenants([TenantEntry(name="t", keys=["secret-1", "secret-2"])], 2.0, 1)
    assert tenants.admit("Bearer secret-1", 5.0) == "t"
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            tenants.admit("Bearer wrong", 5.0)
    with pytest.raises(RateLimited) as caught:
        tenants.admit("bearer secret-2", 5.0)
    assert caught.value.retry_after_s == 0.5
    assert tenants.admit("bearer secret-2", 5.5) == "t"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"api_keys": "secret-key"}, "must look like"),
        ({"api_keys": "secret-key=a b"}, "must look like"),
        ({"api_keys": "short=a"}, "fewer than 8"),
        ({"api_keys": "secret-key=a,secret-key=b"}, "listed twice"),
        ({"tenants_file": "missing.json"}, "cannot read"),
    ],
)
def test_keys_that_cannot_work_are_refused_without_being_told(fields, message):
    with pytest.raises(ValidationError, match=message) as caught:
        GatewaySettings(**fields)
    told = "".join(error["msg"] for error in caught.value.errors())
    assert "secret" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ('{"tenants": [{"name": "a", "keys": []}]}', "keys"),
        ('{"tenants": [{"name": "a:b", "keys": ["secret-1"]}]}', "name"),
        ('{"tenants": [{"name": "a", "keys": ["secret-1"], "rps": 1}]}', "rps"),
    ],
)
def test_a_file_that_cannot_work_is_refused_with_its_place(tmp_path, text, message):
    file = tmp_path / "tenants.json"
    file.write_text(text)
    with pytest.raises(ValidationError, match=message):
        GatewaySettings(tenants_file=file)


@pytest.mark.parametrize(("keys", "status"), [(KEYS, 0), ("secret-key", 2)])
def test_no_key_is_printed(monkeypatch, keys, status):
    monkeypatch.setenv("BATON_GATEWAY_API_KEYS", keys)
    command = [sys.executable, "-m", "baton.gateway", "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == status
    assert "api_keys" in done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr

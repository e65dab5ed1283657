"""The console's paths: its page for everybody, its data for those with a key."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock
from urllib.parse import quote

import httpx
import pytest

from baton.client import AsyncClient, NoWorker, RetryPolicy
from baton.gateway.console import routes
from baton.gateway.console.feed import ConsoleFeed
from tests.support.eventually import eventually
from tests.support.gateway_rig import running_gateway

KEYS = "secret-a1=acme"
ONCE = RetryPolicy(max_attempts=1)


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


async def test_the_page_and_its_parts_are_served_under_a_strict_policy() -> None:
    async with running_gateway() as edge:
        page = await edge.raw.get("/console")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        parts = re.findall(r'(?:src|href)="(/console/[^"]+)"', page.text)
        assert {part.rpartition(".")[2] for part in parts} == {"js", "css", "svg"}
        for part in parts:
            answer = await edge.raw.get(part)
            assert answer.status_code == 200, part
            again = await edge.raw.get(part, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for bad in ("/console/nothing.js", "/console/..%2fpages.py", "/console/pages.py"):
            assert (await edge.raw.get(bad)).status_code == 404


async def test_the_state_comes_at_once_and_again() -> None:
    async with (
        running_gateway() as edge,
        edge.raw.stream("GET", "/console/api/live") as response,
    ):
        found = events(response)
        kind, state = await anext(found)
        assert kind == "state"
        service = state["services"][0]
        assert (service["worker_id"], service["role"], service["state"]) == (
            "d1",
            "decode",
            "ready",
        )
        assert service["kv_blocks"] == {"free": 9}
        assert state["output_tokens"] == 5
        record = state["requests"][0]
        assert (record["request_id"], record["stages"][0]["name"]) == ("req-1", "prefill")
        assert record["tracks"] == []
        _, later = await anext(found)
        assert later["clock_s"] > state["clock_s"]


async def test_one_request_comes_with_its_tracks() -> None:
    async with running_gateway() as edge:
        body = (await edge.raw.get("/console/api/requests/req-1")).json()
        assert body["tracks"][0]["name"] == "prefill_chunk"
        assert body["tracks"][0]["slices"][0]["num_tokens"] == 3
        await edge.raw.post(
            "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "a/b?c<i>"}
        )
        odd = edge.fake.requests[0].request_id
        body = (await edge.raw.get(f"/console/api/requests/{quote(odd, safe='')}")).json()
        assert body["request_id"] == odd
        missing = await edge.raw.get("/console/api/requests/req-2")
        assert missing.status_code == 404
        assert (await edge.raw.get("/console/api/requests/a%20b")).status_code == 400


async def test_data_needs_a_key_where_keys_are_set_and_the_page_does_not() -> None:
    async with running_gateway(api_keys=KEYS) as edge:
        assert (await edge.raw.get("/console")).status_code == 200
        for path in ("/console/api/live", "/console/api/requests/req-1"):
            assert (await edge.raw.get(path)).status_code == 401
        headers = {"authorization": "Bearer secret-a1"}
        assert (
            await edge.raw.get("/console/api/requests/req-1", headers=headers)
        ).status_code == 200
        async with edge.raw.stream("GET", "/console/api/live", headers=headers) as response:
            await anext(events(response))
        assert edge.fake.tenants == ["acme", "acme"], "nobody else's requests are asked for"


async def test_it_can_be_switched_off() -> None:
    async with running_gateway(console=False) as edge:
        assert (await edge.raw.get("/console")).status_code == 404
        assert (await edge.raw.get("/console/api/live")).status_code == 404


async def test_viewers_are_bounded_and_counted_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_VIEWERS", 1)
    async with running_gateway() as edge:
        async with edge.raw.stream("GET", "/console/api/live") as response:
            await anext(events(response))
            assert (await edge.raw.get("/console/api/live")).status_code == 429

        async def is_free() -> bool:
            async with edge.raw.stream("GET", "/console/api/live") as response:
                return response.status_code == 200

        await eventually(is_free)


async def test_a_silent_scheduler_is_a_problem_not_an_end() -> None:
    async with running_gateway() as edge:
        edge.fake.status_error = NoWorker("gone")
        async with edge.raw.stream("GET", "/console/api/live") as response:
            found = events(response)
            kind, problem = await anext(found)
            assert (kind, problem["error"]["code"]) == ("problem", "no_worker")
            edge.fake.status_error = None
            assert (await anext(found))[0] == "state"


async def test_a_scheduler_that_does_not_answer_hides_nothing_of_the_others() -> None:
    async with running_gateway() as edge, AsyncClient("127.0.0.1:1", retry=ONCE) as dead:
        schedulers = edge.gateway._schedulers
        both = [dead, await schedulers.client()]
        schedulers.clients = AsyncMock(return_value=both)  # type: ignore[method-assign]
        feed = ConsoleFeed(schedulers)
        state = await feed.now("")
        assert [service["worker_id"] for service in state["services"]] == ["d1"]
        assert [record["request_id"] for record in state["requests"]] == ["req-1"]
        assert (await feed.request("req-1", ""))["request_id"] == "req-1"


async def test_draining_ends_the_stream() -> None:
    async with (
        running_gateway() as edge,
        edge.raw.stream("GET", "/console/api/live") as response,
    ):
        found = events(response)
        await anext(found)
        edge.gateway.is_draining = True
        async with asyncio.timeout(5):
            assert [kind async for kind, _ in found] in ([], ["state"])

"""The console's paths: its page for everybody, its data for those with a key."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock
from urllib.parse import quote

import httpx
import pytest

from baton.client import AsyncClient, NoWorker, RetryPolicy
from baton.gateway.console import pages, routes
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


async def test_a_tenant_with_all_its_pages_open_locks_nobody_else_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routes, "MAX_VIEWERS", 1)
    acme, globex = ({"authorization": f"Bearer secret-{key}"} for key in ("a1", "b1"))
    async with (
        running_gateway(api_keys="secret-a1=acme,secret-b1=globex") as edge,
        edge.raw.stream("GET", "/console/api/live", headers=acme) as response,
    ):
        await anext(events(response))
        assert (await edge.raw.get("/console/api/live", headers=acme)).status_code == 429
        async with edge.raw.stream("GET", "/console/api/live", headers=globex) as response:
            assert response.status_code == 200


async def test_it_leaves_its_tenants_rate_to_requests() -> None:
    headers = {"authorization": "Bearer secret-a1"}
    limits = {"tenant_requests_per_s": 0.001, "tenant_burst": 1}
    async with running_gateway(api_keys=KEYS, **limits) as edge:
        for _ in range(3):
            answer = await edge.raw.get("/console/api/requests/req-1", headers=headers)
            assert answer.status_code == 200
        for status in (200, 429):
            assert (await edge.raw.get("/v1/models", headers=headers)).status_code == status


def test_only_one_file_touches_the_browsers_storage() -> None:
    """Where the user blocks storage, looking at it throws: storage.js catches that."""
    found = {
        path.name
        for path in pages._FOLDER.glob("*.js")
        if re.search(r"(?:local|session)Storage\b(?!\")", path.read_text(encoding="utf-8"))
    }
    assert found == set()
    assert "window[storage]" in (pages._FOLDER / "storage.js").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's own file in Node.js")
def test_blocked_storage_breaks_nothing() -> None:
    script = """
      globalThis.window = { get localStorage() { throw new Error("blocked"); } };
      const { recall, remember, forget } = await import(process.argv[1]);
      const seen = [recall("localStorage", "a")];
      remember("localStorage", "a", "1");
      seen.push(recall("localStorage", "a"));
      forget("localStorage", "a");
      console.log(JSON.stringify([...seen, recall("localStorage", "a")]));
    """
    source = base64.b64encode((pages._FOLDER / "storage.js").read_bytes()).decode()
    command = ["node", "--input-type=module", "-e", script, f"data:text/javascript;base64,{source}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == [None, "1", None]


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

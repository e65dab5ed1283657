"""The gateway's OpenAPI document, and bodies that nobody should send."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route

from baton.gateway.app import ENDPOINTS
from baton.gateway.openapi import openapi_document
from tests.support.eventually import eventually
from tests.support.gateway_rig import running_gateway

ERROR = openapi_document(ENDPOINTS)["components"]["schemas"]["Error"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
JSON_TYPE = {"content-type": "application/json"}
TEXT = st.text(max_size=8)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "wizard"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": TEXT}))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": TEXT | st.none() | PARTS},
        optional={"tool_calls": st.lists(JSON, max_size=2), "tool_call_id": TEXT, "name": TEXT},
    ),
    max_size=3,
)
TOOLS = st.lists(
    st.fixed_dictionaries({
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "g", "a b"])},
            optional={"parameters": st.dictionaries(TEXT, JSON, max_size=3)},
        ),
    }),
    max_size=2,
)
CHOICES = st.sampled_from([
    "auto", "none", "required", {"type": "function", "function": {"name": "f"}},
])  # fmt: skip
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXT | st.lists(TEXT, max_size=2) | st.lists(st.integers(0, 300), max_size=4),
    "messages": MESSAGES,
    "tokens": st.lists(st.integers(0, 127), max_size=4),
    "tools": TOOLS,
    "tool_choice": CHOICES,
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "n": st.integers(0, 3),
    "stop": TEXT | st.lists(TEXT, max_size=3),
    "logit_bias": st.dictionaries(st.integers(-2, 9).map(str), st.floats(-200, 200), max_size=2),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
}


BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "integer": st.integers(-1, 20),
    "number": st.floats(0, 1),
    "boolean": st.booleans(),
    "string": TEXT,
    "array": st.lists(st.integers(0, 9), max_size=3),
}


def bodies(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Objects with some of the known fields: plausible values mostly, else anything."""

    def value(name: str) -> st.SearchStrategy[Any]:
        entry = schema["properties"][name]
        types = [option.get("type") for option in (entry, *entry.get("anyOf", ()))]
        typed = st.one_of(*(BY_TYPE[kind] for kind in types if kind in BY_TYPE), st.none())
        plausible = PLAUSIBLE.get(name, typed)
        return st.one_of(*[plausible] * 7, JSON)

    names = sorted(schema["properties"])
    required = {name: value(name) for name in schema.get("required", ())}
    some = st.lists(st.sampled_from(names), max_size=3, unique=True)
    objects = some.flatmap(
        lambda chosen: st.fixed_dictionaries({**required, **{n: value(n) for n in chosen}})
    )
    return st.one_of(*[objects] * 9, JSON)


def body_schemas() -> dict[str, dict[str, Any]]:
    whole = openapi_document(ENDPOINTS)
    found = {}
    for path, operations in whole["paths"].items():
        if "post" in operations:
            content = operations["post"]["requestBody"]["content"]["application/json"]
            name = content["schema"]["$ref"].rpartition("/")[2]
            found[path] = whole["components"]["schemas"][name]
    return found


async def test_the_document_has_every_route_and_no_other():
    async with running_gateway() as edge:
        served = {
            (route.path.replace(":path", ""), method.lower())
            for route in edge.gateway.routes()
            if isinstance(route, Route) and not route.path.startswith("/console")
            for method in (route.methods or ()) - {"HEAD"}
        }
        sent = (await edge.raw.get("/openapi.json")).json()
    assert sent == openapi_document(ENDPOINTS)
    listed = {
        (path, method)
        for path, operations in sent["paths"].items()
        for method in operations.keys() - {"parameters"}
    }
    assert listed == served


def test_its_references_lead_somewhere_and_its_schemas_are_schemas():
    whole = openapi_document(ENDPOINTS)
    text = json.dumps(whole)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    schemas = whole["components"]["schemas"]
    assert names <= set(schemas)
    assert {"ChatBody", "CompletionBody", "Tool", "Error"} <= set(schemas)
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "messages" in schemas["ChatBody"]["required"]


def check(response: httpx.Response) -> None:
    assert response.status_code < 500 or response.status_code in {501, 503}, response.text
    if response.status_code >= 400:
        jsonschema.validate(response.json(), ERROR)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"code":"internal"' not in response.text


def fuzz(url: str) -> int:
    """Sends what hypothesis thinks of; returns how many were answered well."""
    schemas = body_schemas()
    requests = st.sampled_from(sorted(schemas)).flatmap(
        lambda path: st.tuples(st.just(path), bodies(schemas[path]).map(json.dumps).map(str.encode))
    )
    requests |= st.tuples(st.sampled_from(sorted(schemas)), st.binary())
    num_good = 0

    with httpx.Client(base_url=url, timeout=5.0, verify=False) as http:

        @settings(
            max_examples=400,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(requests)
        def send(request: tuple[str, bytes]) -> None:
            nonlocal num_good
            response = http.post(request[0], content=request[1], headers=JSON_TYPE)
            check(response)
            num_good += response.status_code == 200

        send()
    return num_good


async def test_no_body_breaks_the_gateway_or_makes_it_hang():
    async with running_gateway() as edge:
        num_good = await asyncio.to_thread(fuzz, edge.url)
        assert num_good > 30, "most bodies are refused at once: they test little"
        await eventually(lambda: edge.gateway.num_running == 0)
        assert (await edge.raw.get("/health")).status_code == 200

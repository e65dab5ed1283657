"""The OpenAPI document, derived from the table of endpoints and the models of their bodies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import models_json_schema

from baton.gateway.endpoints import Access, Endpoint
from baton.rpc.version import VERSION

_SCHEMAS = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_FAILURE = {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _TEXT}
_DETAIL = {"type": "object", "required": list(_FAILURE), "properties": _FAILURE}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": _DETAIL}}


def openapi_document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The whole document."""
    endpoints = list(endpoints)
    bodies = [(endpoint.body, "validation") for endpoint in endpoints if endpoint.body]
    _, schemas = models_json_schema(bodies, ref_template=_SCHEMAS)  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": VERSION},
        "paths": {
            endpoint.path.replace(":path", ""): {endpoint.method.lower(): _operation(endpoint)}
            for endpoint in endpoints
        },
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    kinds = ["application/json"]
    if endpoint.body and "stream" in endpoint.body.model_fields:
        kinds.append("text/event-stream")
    operation: dict[str, Any] = {
        "summary": (endpoint.handler.__doc__ or "").rstrip("."),
        "responses": {
            "200": {"description": "The answer", "content": {kind: {} for kind in kinds}},
            "default": {"description": "The failure", "content": _content("Error")},
        },
    }
    names = [part.split(":")[0] for part in endpoint.path.replace("}", "{").split("{")[1::2]]
    if names:
        shared = {"in": "path", "required": True, "schema": _TEXT}
        operation["parameters"] = [{"name": name, **shared} for name in names]
    if endpoint.body:
        operation["requestBody"] = {"required": True, "content": _content(endpoint.body.__name__)}
    if endpoint.access is not Access.OPEN:
        operation["security"] = [{"apiKey": []}, {}]
    return operation


def _content(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=model)}}}

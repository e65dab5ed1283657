"""The OpenAPI document of the gateway, from the models that check its bodies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from baton.gateway.embeddings import EmbeddingsBody
from baton.gateway.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from baton.rpc.version import VERSION

_POSTS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("/v1/chat/completions", "Answers a conversation", ChatBody),
    ("/v1/completions", "Completes a prompt", CompletionBody),
    ("/v1/embeddings", "Turns texts or token ids into vectors", EmbeddingsBody),
    ("/tokenize", "Text or a conversation to token ids", TokenizeBody),
    ("/detokenize", "Token ids to text", DetokenizeBody),
)
_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})
_GETS = (
    ("/v1/models", "The models served", True),
    ("/v1/models/{model}", "One model", True),
    ("/health", "The process answers", False),
    ("/ready", "A generation sent now has somewhere to run", False),
    ("/version", "Version of Baton", False),
    ("/metrics", "Metrics in Prometheus's format", False),
    ("/openapi.json", "This document", False),
)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_KEY: list[dict[str, list[str]]] = [{"apiKey": []}, {}]


def document() -> dict[str, Any]:
    """The whole document."""
    template = "#/components/schemas/{model}"
    bodies = [(model, "validation") for _, _, model in _POSTS]
    _, schemas = models_json_schema(bodies, ref_template=template)  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for path, summary, model in _POSTS:
        schema = {"$ref": template.format(model=model.__name__)}
        content = ["application/json", *(["text/event-stream"] if path in _STREAMS else [])]
        operation = _operation(summary, content, needs_key=True)
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
        paths[path] = {"post": operation}
    for path, summary, needs_key in _GETS:
        content = ["text/plain" if path == "/metrics" else "application/json"]
        paths[path] = {"get": _operation(summary, content, needs_key=needs_key)}
    paths["/v1/models/{model}"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(summary: str, content: list[str], *, needs_key: bool) -> dict[str, Any]:
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer", "content": {kind: {} for kind in content}},
            "default": {
                "description": "What went wrong",
                "content": {"application/json": error},
            },
        },
    }
    if needs_key:
        operation["security"] = _KEY
    return operation

"""/v1/embeddings: its request body, and its answers in OpenAI's shape.

`pooling` and `normalize` are not OpenAI's; vLLM has `normalize`, too.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.client import AsyncClient, Embeddings, EmbedOptions, InvalidRequest
from baton.core.embedding import MAX_INPUTS
from baton.core.errors import Internal
from baton.gateway.failures import json_response


class EmbeddingsBody(BaseModel):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model: str = ""
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, le=1 << 20)
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    priority: int = 0
    cache_salt: str | None = None

    def check(self) -> None:
        """Checks the inputs.

        Raises:
            InvalidRequest: there are none or too many, or one is empty.
        """
        inputs = [self.input] if isinstance(self.input, str) else self.input
        if not inputs or "" in inputs or [] in inputs:
            raise InvalidRequest("input must not be empty, nor contain an empty input")
        if not isinstance(inputs[0], int) and len(inputs) > MAX_INPUTS:
            raise InvalidRequest(f"input must hold at most {MAX_INPUTS} inputs, got {len(inputs)}")

    def options(self) -> EmbedOptions:
        """The SDK's options."""
        return EmbedOptions(
            model=self.model,
            pooling=self.pooling,
            dimensions=self.dimensions,
            scaled=self.normalize,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
        )


def embeddings_answer(client: AsyncClient, body: EmbeddingsBody, options: EmbedOptions) -> ASGIApp:
    """The ASGI application that answers one request."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        embeddings = await client.embed(body.input, **options)
        is_base64 = body.encoding_format == "base64"
        response = json_response(embeddings_json(embeddings, is_base64=is_base64))
        await response(scope, receive, send)

    return answer


def embeddings_json(embeddings: Embeddings, *, is_base64: bool) -> dict[str, Any]:
    """The answer as one object.

    Raises:
        Internal: a vector has a component that is not finite, which JSON cannot hold.
    """
    # A sum is finite only if all components are, and much faster than a test of each.
    if not all(math.isfinite(sum(vector)) for vector in embeddings.vectors):
        raise Internal("the model computed an embedding that is not finite")
    return {
        "object": "list",
        "model": embeddings.model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if is_base64 else vector,
            }
            for index, vector in enumerate(embeddings.vectors)
        ],
        "usage": {
            "prompt_tokens": embeddings.usage.prompt_tokens,
            "total_tokens": embeddings.usage.prompt_tokens,
        },
    }


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

"""What users of the SDK import: a name that goes, or comes, is meant to."""

from __future__ import annotations

import inspect

import pytest

import baton.client
from baton.client import AsyncClient, Client

EXPORTS = {
    "AsyncClient",
    "AsyncTextStream",
    "BatonError",
    "Cancelled",
    "ChatOptions",
    "Chunk",
    "Client",
    "ClusterStatus",
    "Completion",
    "DeadlineExceeded",
    "EmbedOptions",
    "Embeddings",
    "ErrorReason",
    "Forbidden",
    "GenerateOptions",
    "Guide",
    "GuideKind",
    "Internal",
    "InvalidRequest",
    "KvCacheFull",
    "KvChecksum",
    "KvLayoutMismatch",
    "KvTransferLost",
    "Logprob",
    "Model",
    "ModelNotFound",
    "NoWorker",
    "PinOptions",
    "PinnedPrefix",
    "Placement",
    "PromptTooLong",
    "QueueFull",
    "RequestList",
    "RequestNotFound",
    "RequestRecord",
    "RetryPolicy",
    "Slice",
    "Stage",
    "StaleEpoch",
    "Stalled",
    "TextStream",
    "Tls",
    "TopLogprob",
    "Track",
    "Unauthenticated",
    "Unsupported",
    "Usage",
    "WorkerDraining",
}
METHODS = {
    "chat": ["messages", "stream", "options"],
    "close": [],
    "embed": ["inputs", "options"],
    "detokenize": ["token_ids", "model", "timeout_s"],
    "generate": ["prompt", "stream", "options"],
    "models": ["timeout_s"],
    "pin_prefix": ["prompt", "options"],
    "pinned_prefixes": ["timeout_s"],
    "request": ["request_id", "tenant", "timeout_s"],
    "requests": ["limit", "tenant", "timeout_s"],
    "status": ["timeout_s"],
    "tokenize": ["text", "messages", "model", "timeout_s"],
    "unpin_prefix": ["pin_id", "timeout_s"],
}


def test_exports():
    assert set(baton.client.__all__) == EXPORTS
    assert [name for name in EXPORTS if not hasattr(baton.client, name)] == []


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_both_clients_have_the_same_methods(cls):
    methods = {
        name: [
            parameter for parameter in inspect.signature(method).parameters if parameter != "self"
        ]
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    assert methods == METHODS
    expected = ["address", "timeout_s", "api_key", "tls", "retry", "rng"]
    assert list(inspect.signature(cls).parameters) == expected

"""The Baton SDK: `Client` and `AsyncClient`, their values, and the errors that they raise."""

from baton.client.async_client import AsyncClient
from baton.client.async_stream import AsyncTextStream
from baton.client.retry import RetryPolicy
from baton.client.sync_client import Client
from baton.client.sync_stream import TextStream
from baton.client.types import (
    ChatOptions,
    Completion,
    EmbedOptions,
    GenerateOptions,
    PinOptions,
    Tls,
)
from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    ErrorReason,
    Forbidden,
    Internal,
    InvalidRequest,
    KvCacheFull,
    KvChecksum,
    KvLayoutMismatch,
    KvTransferLost,
    ModelNotFound,
    NoWorker,
    PromptTooLong,
    QueueFull,
    RequestNotFound,
    StaleEpoch,
    Stalled,
    Unauthenticated,
    Unsupported,
    WorkerDraining,
)
from baton.core.guide import Guide, GuideKind
from baton.core.output import Usage
from baton.core.request import Stage
from baton.core.timeline import Slice, Track
from baton.wire.inference.chunks import Chunk, Logprob, TopLogprob
from baton.wire.inference.chunks import PlacementTaken as Placement
from baton.wire.inference.overview import ClusterStatus, Model
from baton.wire.inference.pins import PinnedPrefix
from baton.wire.inference.records import RequestList, RequestRecord
from baton.wire.inference.vectors import Embeddings

__all__ = [
    "AsyncClient", "AsyncTextStream", "BatonError", "Cancelled", "ChatOptions", "Chunk", "Client",
    "ClusterStatus", "Completion", "DeadlineExceeded", "EmbedOptions", "Embeddings", "ErrorReason",
    "Forbidden", "GenerateOptions", "Guide", "GuideKind", "Internal", "InvalidRequest",
    "KvCacheFull", "KvChecksum", "KvLayoutMismatch", "KvTransferLost", "Logprob", "Model",
    "ModelNotFound", "NoWorker", "PinOptions", "PinnedPrefix", "Placement", "PromptTooLong",
    "QueueFull", "RequestList", "RequestNotFound", "RequestRecord", "RetryPolicy", "Slice", "Stage",
    "StaleEpoch", "Stalled", "TextStream", "Tls", "TopLogprob", "Track", "Unauthenticated",
    "Unsupported", "Usage", "WorkerDraining",
]  # fmt: skip

"""What a scheduler knows of its cluster: the models served, and every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.core.cluster import ServiceStatus
from baton.v1 import inference_pb2 as pb2
from baton.wire.cluster import shown_status_from_pb, status_to_pb
from baton.wire.fields import as_message, as_value


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    max_model_len_tokens: int
    """Prompt and output together."""
    num_prefill_workers: int
    num_decode_workers: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Every process that the scheduler knows."""

    services: tuple[ServiceStatus, ...]
    bus_connected: bool
    requests_by_state: Mapping[str, int] = field(default_factory=dict)


def models_to_pb(models: Sequence[Model]) -> pb2.ListModelsResponse:
    """The wire's form."""
    infos = [as_message(pb2.ModelInfo, model, model=model.name) for model in models]
    return pb2.ListModelsResponse(models=infos)


def models_from_pb(pb: pb2.ListModelsResponse) -> list[Model]:
    """The served models."""
    return [as_value(Model, entry, name=entry.model) for entry in pb.models]


def overview_to_pb(status: ClusterStatus) -> pb2.GetClusterStatusResponse:
    """The wire's form."""
    services = [status_to_pb(service) for service in status.services]
    return as_message(pb2.GetClusterStatusResponse, status, services=services)


def overview_from_pb(pb: pb2.GetClusterStatusResponse) -> ClusterStatus:
    """The cluster's status."""
    services = tuple(shown_status_from_pb(service) for service in pb.services)
    return as_value(
        ClusterStatus, pb, services=services, requests_by_state=dict(pb.requests_by_state)
    )

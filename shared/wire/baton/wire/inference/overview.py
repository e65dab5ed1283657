"""What a scheduler knows of its cluster: the models served, and every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.core.cluster import ServiceStatus
from baton.v1 import inference_pb2
from baton.wire.cluster import shown_status_from_pb, status_to_pb


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


def models_to_pb(models: Sequence[Model]) -> inference_pb2.ListModelsResponse:
    """The wire's form."""
    return inference_pb2.ListModelsResponse(
        models=[
            inference_pb2.ModelInfo(
                model=model.name,
                max_model_len_tokens=model.max_model_len_tokens,
                num_prefill_workers=model.num_prefill_workers,
                num_decode_workers=model.num_decode_workers,
            )
            for model in models
        ]
    )


def models_from_pb(pb: inference_pb2.ListModelsResponse) -> list[Model]:
    """The served models."""
    return [
        Model(
            name=entry.model,
            max_model_len_tokens=entry.max_model_len_tokens,
            num_prefill_workers=entry.num_prefill_workers,
            num_decode_workers=entry.num_decode_workers,
        )
        for entry in pb.models
    ]


def overview_to_pb(status: ClusterStatus) -> inference_pb2.GetClusterStatusResponse:
    """The wire's form."""
    return inference_pb2.GetClusterStatusResponse(
        services=[status_to_pb(service) for service in status.services],
        bus_connected=status.bus_connected,
        requests_by_state=status.requests_by_state,
    )


def overview_from_pb(pb: inference_pb2.GetClusterStatusResponse) -> ClusterStatus:
    """The cluster's status."""
    return ClusterStatus(
        services=tuple(shown_status_from_pb(service) for service in pb.services),
        bus_connected=pb.bus_connected,
        requests_by_state=dict(pb.requests_by_state),
    )

"""A finished session as spans and counts."""

from __future__ import annotations

from opentelemetry.context import Context

from baton.decode.sessions import Session
from baton.rpc.telemetry import Telemetry


def record(telemetry: Telemetry, session: Session, parent: Context, ended_at_s: float) -> None:
    """Records the stages that the session went through."""
    if not session.first_token_at_s:
        return
    computable_at_s = session.committed_at_s or session.arrived_at_s
    started_at_s = max(session.started_at_s, computable_at_s)
    attributes = {
        "baton.request.id": session.reservation.request_id,
        "baton.attempt": session.reservation.attempt,
    }
    telemetry.record_span("decode.queue", computable_at_s, started_at_s, parent, attributes)
    telemetry.record_span(
        "decode.first_step", started_at_s, session.first_token_at_s, parent, attributes
    )
    telemetry.record_span(
        "decode",
        session.first_token_at_s,
        ended_at_s,
        parent,
        {
            **attributes,
            "baton.tokens": session.num_tokens,
            "baton.draft_tokens": session.num_draft_tokens,
            "baton.accepted_tokens": session.num_accepted_tokens,
        },
    )

"""A job's stages as spans."""

from __future__ import annotations

from opentelemetry.context import Context

from baton.prefill.jobs import Job, JobDone, JobEvent, JobFirstToken, JobStarted
from baton.rpc.telemetry import Attributes, Telemetry


class Recorder:
    """Records one job's stages, as children of the call that asked for it."""

    def __init__(self, telemetry: Telemetry, job: Job, parent: Context) -> None:
        self._telemetry = telemetry
        self._job = job
        self._parent = parent
        self._attributes = {
            "baton.request.id": job.request_id,
            "baton.attempt": job.attempt,
        }

    def note(self, event: JobEvent) -> None:
        """Records the stage that the event ends."""
        match event:
            case JobStarted():
                self._record(
                    "prefill.queue",
                    event.arrived_at_s,
                    event.at_s,
                    {"baton.fetched_tokens": event.fetched_tokens},
                )
                self._attributes["baton.cached_tokens"] = event.cached_tokens
            case JobFirstToken():
                tokens = {"baton.prompt_tokens": len(self._job.spec.token_ids)}
                self._record("prefill.compute", event.started_at_s, event.at_s, tokens)
            case JobDone(report) if report is not None:
                self._record(
                    "kv.transfer",
                    report.began_at_s,
                    report.ended_at_s,
                    {
                        "baton.kv.transport": report.transport,
                        "baton.kv.bytes": report.num_bytes,
                        "baton.kv.blocks": report.num_blocks,
                        "baton.kv.chunks": report.num_chunks,
                        "baton.kv.bytes_per_s": report.num_bytes / max(report.active_s, 1e-9),
                        "baton.kv.exposed_s": report.exposed_s,
                        "baton.kv.idle_s": report.idle_s,
                        "baton.kv.starved_s": report.starved_s,
                        "baton.target.worker_id": self._target_id(),
                    },
                )
            case _:
                pass

    def _target_id(self) -> str:
        return self._job.target.worker_id if self._job.target else ""

    def _record(self, name: str, start_s: float, end_s: float, attributes: Attributes) -> None:
        self._telemetry.record_span(
            name, start_s, end_s, self._parent, {**self._attributes, **attributes}
        )

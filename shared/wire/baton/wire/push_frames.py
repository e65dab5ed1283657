"""A push's frames and answers, to and from protobuf; keeps no state."""

from __future__ import annotations

from baton.core.errors import BatonError, KvLayoutMismatch, error_for
from baton.core.handoff.frames import (
    ChunkFrame,
    Committed,
    Credit,
    KvChunk,
    KvEncoding,
    Manifest,
    Opening,
    PullOffer,
    PushAnswer,
    PushFrame,
    SignOfLife,
    SlotOffer,
    Span,
    Staged,
)
from baton.v1 import kv_transfer_pb2 as pb
from baton.wire.errors import public_message, reason_from_pb, reason_to_pb
from baton.wire.fields import as_message, as_value, parsed
from baton.wire.frames import decode_frame, encode_frame
from baton.wire.layout import fingerprint_from_pb, fingerprint_to_pb
from baton.wire.sampling import logprob_from_pb, logprob_to_pb

_MAX_TRANSPORTS = 8
_NOTHING = memoryview(b"")


def frame_to_bytes(frame: PushFrame) -> bytes:
    """A frame as it is sent; its payload is copied once."""
    payload = frame.payload if isinstance(frame, ChunkFrame) else _NOTHING
    return encode_frame(_header_to_pb(frame).SerializeToString(), payload)


def _header_to_pb(frame: PushFrame) -> pb.PushHeader:
    match frame:
        case Opening():
            return pb.PushHeader(epoch=frame.epoch, open=_opening_to_pb(frame))
        case ChunkFrame():
            chunk, span = frame.chunk, frame.chunk.span
            sent = as_message(
                pb.PushChunk,
                span,
                sequence=chunk.sequence,
                checksum=chunk.checksum,
                slot_bytes=frame.slot_bytes,
            )
            return pb.PushHeader(epoch=chunk.epoch, chunk=sent)
        case Manifest():
            return pb.PushHeader(epoch=frame.epoch, manifest=_manifest_to_pb(frame))
        case SignOfLife():
            return pb.PushHeader(epoch=frame.epoch)


def frame_from_bytes(message: bytes) -> PushFrame:
    """A frame; its payload is a view into the message.

    Raises:
        InvalidRequest: the message is no frame.
        KvLayoutMismatch: it names an encoding that is not known.
    """
    view, payload = decode_frame(message)
    header = parsed(pb.PushHeader, view, "header")
    match header.WhichOneof("kind"):
        case "open":
            return _opening_from_pb(header.open, header.epoch)
        case "chunk":
            sent = header.chunk
            span = as_value(Span, sent)
            chunk = KvChunk(header.epoch, sent.sequence, span, sent.checksum)
            return ChunkFrame(chunk, payload, sent.slot_bytes)
        case "manifest":
            return _manifest_from_pb(header.manifest, header.epoch)
    return SignOfLife(header.epoch)


def answer_to_pb(answer: PushAnswer) -> pb.PushResponse:
    """An answer as it is sent."""
    match answer:
        case PullOffer(num_slots, slot_bytes):
            offer = pb.PushOffer(
                num_slots=num_slots, slot_bytes=slot_bytes, staged=pb.StagedOffer()
            )
            return pb.PushResponse(offer=offer)
        case SlotOffer():
            memory = as_message(pb.SharedMemory, answer)
            return pb.PushResponse(offer=as_message(pb.PushOffer, answer, shared_memory=memory))
        case Credit():
            return pb.PushResponse(credit=as_message(pb.PushCredit, answer))
        case Committed():
            return pb.PushResponse(committed=as_message(pb.PushCommitted, answer))


def failure_to_pb(error: BatonError) -> pb.PushResponse:
    """The last answer of a push that failed."""
    failed = pb.PushFailed(reason=reason_to_pb(error.reason), message=public_message(error))
    return pb.PushResponse(failed=failed)


def answer_from_pb(response: pb.PushResponse) -> PushAnswer:
    """An answer. Raises the decode worker's reason where the push has failed."""
    match response.WhichOneof("kind"):
        case "failed":
            raise error_for(reason_from_pb(response.failed.reason), response.failed.message)
        case "committed":
            return as_value(Committed, response.committed)
        case "offer":
            offer, memory = response.offer, response.offer.shared_memory
            if offer.HasField("staged"):
                return as_value(PullOffer, offer)
            return as_value(SlotOffer, offer, pid=memory.pid, fd=memory.fd)
    return as_value(Credit, response.credit)


def _opening_to_pb(opening: Opening) -> pb.PushOpen:
    return as_message(
        pb.PushOpen,
        opening,
        fingerprint=fingerprint_to_pb(opening.fingerprint),
        staged=as_message(pb.StagedMemory, opening.staged) if opening.staged else None,
        encoding=opening.encoding.value,
    )


def _opening_from_pb(sent: pb.PushOpen, epoch: int) -> Opening:
    try:
        encoding = KvEncoding(sent.encoding)
    except ValueError as error:
        raise KvLayoutMismatch(f"KV encoding {sent.encoding} is not known here") from error
    return as_value(
        Opening,
        sent,
        epoch=epoch,
        fingerprint=fingerprint_from_pb(sent.fingerprint),
        transports=tuple(sent.transports[:_MAX_TRANSPORTS]),
        staged=as_value(Staged, sent.staged) if sent.HasField("staged") else None,
        encoding=encoding,
    )


def _manifest_to_pb(manifest: Manifest) -> pb.PushManifest:
    logprob = manifest.first_logprob
    first = logprob_to_pb(logprob) if logprob else None
    return as_message(pb.PushManifest, manifest, first_token_logprob=first)


def _manifest_from_pb(sent: pb.PushManifest, epoch: int) -> Manifest:
    has_logprob = sent.HasField("first_token_logprob")
    first = logprob_from_pb(sent.first_token_logprob) if has_logprob else None
    return as_value(Manifest, sent, epoch=epoch, first_logprob=first)

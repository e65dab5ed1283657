"""A push's frames and answers, to and from protobuf; keeps no state."""

from __future__ import annotations

from dataclasses import asdict

from google.protobuf.message import DecodeError

from baton.core.errors import BatonError, InvalidRequest, KvLayoutMismatch, error_for
from baton.core.handoff.frames import (
    Chunk,
    ChunkFrame,
    Committed,
    Credit,
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
from baton.wire.frames import decode_frame, encode_frame
from baton.wire.layout import fingerprint_from_pb, fingerprint_to_pb
from baton.wire.sampling import logprob_from_pb, logprob_to_pb

_MAX_TRANSPORTS = 8
_MANIFEST_FIELDS = (
    *("num_chunks", "num_bytes", "block_start", "num_blocks"),
    *("num_tokens", "tokens_hash", "checksum", "first_token_id"),
)
"""Fields with the same name and type in the message."""
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
            sent = pb.PushChunk(
                sequence=chunk.sequence,
                layer_start=span.layer_start,
                layer_end=span.layer_end,
                block_start=span.block_start,
                num_blocks=span.num_blocks,
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
    header = pb.PushHeader()
    try:
        header.ParseFromString(bytes(view))
    except DecodeError as error:
        raise InvalidRequest("header must be a baton.v1.PushHeader") from error
    match header.WhichOneof("kind"):
        case "open":
            return _opening_from_pb(header.open, header.epoch)
        case "chunk":
            sent = header.chunk
            span = Span(sent.layer_start, sent.layer_end, sent.block_start, sent.num_blocks)
            chunk = Chunk(header.epoch, sent.sequence, span, sent.checksum)
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
            offer = pb.PushOffer(
                num_slots=answer.num_slots,
                slot_bytes=answer.slot_bytes,
                token=answer.token,
                shared_memory=pb.SharedMemory(pid=answer.pid, fd=answer.fd),
            )
            return pb.PushResponse(offer=offer)
        case Credit(num_chunks):
            return pb.PushResponse(credit=pb.PushCredit(num_chunks=num_chunks))
        case Committed(num_bytes, num_chunks):
            committed = pb.PushCommitted(num_bytes=num_bytes, num_chunks=num_chunks)
            return pb.PushResponse(committed=committed)


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
            return Committed(response.committed.num_bytes, response.committed.num_chunks)
        case "offer":
            offer, memory = response.offer, response.offer.shared_memory
            if offer.HasField("staged"):
                return PullOffer(offer.num_slots, offer.slot_bytes)
            return SlotOffer(offer.num_slots, offer.slot_bytes, offer.token, memory.pid, memory.fd)
    return Credit(response.credit.num_chunks)


def _opening_to_pb(opening: Opening) -> pb.PushOpen:
    return pb.PushOpen(
        reservation_id=opening.reservation_id,
        request_id=opening.request_id,
        attempt=opening.attempt,
        fingerprint=fingerprint_to_pb(opening.fingerprint),
        worker_id=opening.worker_id,
        transports=opening.transports,
        staged=pb.StagedMemory(**asdict(opening.staged)) if opening.staged else None,
        encoding=pb.KvEncoding.Name(opening.encoding.value),
    )


def _opening_from_pb(sent: pb.PushOpen, epoch: int) -> Opening:
    try:
        encoding = KvEncoding(sent.encoding)
    except ValueError as error:
        raise KvLayoutMismatch(f"KV encoding {sent.encoding} is not known here") from error
    at = sent.staged
    staged = Staged(at.agent, at.address, at.num_slots, at.slot_bytes, at.token)
    return Opening(
        reservation_id=sent.reservation_id,
        request_id=sent.request_id,
        attempt=sent.attempt,
        epoch=epoch,
        fingerprint=fingerprint_from_pb(sent.fingerprint),
        worker_id=sent.worker_id,
        transports=tuple(sent.transports[:_MAX_TRANSPORTS]),
        staged=staged if sent.HasField("staged") else None,
        encoding=encoding,
    )


def _manifest_to_pb(manifest: Manifest) -> pb.PushManifest:
    logprob = manifest.first_logprob
    return pb.PushManifest(
        **{name: getattr(manifest, name) for name in _MANIFEST_FIELDS},
        first_token_logprob=logprob_to_pb(logprob) if logprob else None,
    )


def _manifest_from_pb(sent: pb.PushManifest, epoch: int) -> Manifest:
    has_logprob = sent.HasField("first_token_logprob")
    return Manifest(
        epoch=epoch,
        **{name: getattr(sent, name) for name in _MANIFEST_FIELDS},
        first_logprob=logprob_from_pb(sent.first_token_logprob) if has_logprob else None,
    )

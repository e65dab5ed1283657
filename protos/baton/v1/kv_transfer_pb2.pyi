from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_ENCODING_UNSPECIFIED: _ClassVar[KvEncoding]
    KV_ENCODING_INT8: _ClassVar[KvEncoding]
KV_ENCODING_UNSPECIFIED: KvEncoding
KV_ENCODING_INT8: KvEncoding

class PushRequest(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("open", "chunk", "manifest", "epoch")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    open: PushOpen
    chunk: PushChunk
    manifest: PushManifest
    epoch: int
    def __init__(self, open: _Optional[_Union[PushOpen, _Mapping]] = ..., chunk: _Optional[_Union[PushChunk, _Mapping]] = ..., manifest: _Optional[_Union[PushManifest, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class PushOpen(_message.Message):
    __slots__ = ("reservation_id", "request_id", "attempt", "fingerprint", "worker_id", "transports", "staged", "encoding")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    request_id: str
    attempt: int
    fingerprint: _common_pb2.ModelFingerprint
    worker_id: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    staged: StagedMemory
    encoding: KvEncoding
    def __init__(self, reservation_id: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., fingerprint: _Optional[_Union[_common_pb2.ModelFingerprint, _Mapping]] = ..., worker_id: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ..., staged: _Optional[_Union[StagedMemory, _Mapping]] = ..., encoding: _Optional[_Union[KvEncoding, str]] = ...) -> None: ...

class StagedMemory(_message.Message):
    __slots__ = ("agent", "address", "num_slots", "slot_bytes", "token")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    agent: bytes
    address: int
    num_slots: int
    slot_bytes: int
    token: bytes
    def __init__(self, agent: _Optional[bytes] = ..., address: _Optional[int] = ..., num_slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., token: _Optional[bytes] = ...) -> None: ...

class PushChunk(_message.Message):
    __slots__ = ("sequence", "layer_start", "layer_end", "block_start", "num_blocks", "checksum", "slot_bytes")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    BLOCK_START_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    layer_start: int
    layer_end: int
    block_start: int
    num_blocks: int
    checksum: int
    slot_bytes: int
    def __init__(self, sequence: _Optional[int] = ..., layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., block_start: _Optional[int] = ..., num_blocks: _Optional[int] = ..., checksum: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class PushManifest(_message.Message):
    __slots__ = ("num_chunks", "num_bytes", "block_start", "num_blocks", "num_tokens", "tokens_hash", "checksum", "first_token_id", "first_token_logprob")
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_START_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_HASH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    num_chunks: int
    num_bytes: int
    block_start: int
    num_blocks: int
    num_tokens: int
    tokens_hash: bytes
    checksum: int
    first_token_id: int
    first_token_logprob: _common_pb2.TokenLogprob
    def __init__(self, num_chunks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., block_start: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_tokens: _Optional[int] = ..., tokens_hash: _Optional[bytes] = ..., checksum: _Optional[int] = ..., first_token_id: _Optional[int] = ..., first_token_logprob: _Optional[_Union[_common_pb2.TokenLogprob, _Mapping]] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("credit", "committed", "failed", "offer")
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    credit: PushCredit
    committed: PushCommitted
    failed: PushFailed
    offer: PushOffer
    def __init__(self, credit: _Optional[_Union[PushCredit, _Mapping]] = ..., committed: _Optional[_Union[PushCommitted, _Mapping]] = ..., failed: _Optional[_Union[PushFailed, _Mapping]] = ..., offer: _Optional[_Union[PushOffer, _Mapping]] = ...) -> None: ...

class PushCredit(_message.Message):
    __slots__ = ("num_chunks",)
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    num_chunks: int
    def __init__(self, num_chunks: _Optional[int] = ...) -> None: ...

class PushOffer(_message.Message):
    __slots__ = ("num_slots", "slot_bytes", "token", "shared_memory", "staged")
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    num_slots: int
    slot_bytes: int
    token: bytes
    shared_memory: SharedMemory
    staged: StagedOffer
    def __init__(self, num_slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., token: _Optional[bytes] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., staged: _Optional[_Union[StagedOffer, _Mapping]] = ...) -> None: ...

class StagedOffer(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("pid", "fd")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ...) -> None: ...

class PushCommitted(_message.Message):
    __slots__ = ("num_bytes", "num_chunks")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    num_chunks: int
    def __init__(self, num_bytes: _Optional[int] = ..., num_chunks: _Optional[int] = ...) -> None: ...

class PushFailed(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.ErrorReason
    message: str
    def __init__(self, reason: _Optional[_Union[_common_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

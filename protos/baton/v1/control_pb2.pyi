import datetime

from baton.v1 import inference_pb2 as _inference_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status", "rates", "now")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    status: _inference_pb2.ServiceStatus
    rates: WorkerRates
    now: _timestamp_pb2.Timestamp
    def __init__(self, status: _Optional[_Union[_inference_pb2.ServiceStatus, _Mapping]] = ..., rates: _Optional[_Union[WorkerRates, _Mapping]] = ..., now: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace",)
    GRACE_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    def __init__(self, grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_requests_running",)
    NUM_REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    num_requests_running: int
    def __init__(self, num_requests_running: _Optional[int] = ...) -> None: ...

class GetKvSnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetKvSnapshotResponse(_message.Message):
    __slots__ = ("worker_id", "sequence", "block_hashes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    sequence: int
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, worker_id: _Optional[str] = ..., sequence: _Optional[int] = ..., block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KvEvent(_message.Message):
    __slots__ = ("worker_id", "sequence", "stored", "removed")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    sequence: int
    stored: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, worker_id: _Optional[str] = ..., sequence: _Optional[int] = ..., stored: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("status", "lease", "leaving", "rates")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    status: _inference_pb2.ServiceStatus
    lease: _duration_pb2.Duration
    leaving: bool
    rates: WorkerRates
    def __init__(self, status: _Optional[_Union[_inference_pb2.ServiceStatus, _Mapping]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., leaving: bool = ..., rates: _Optional[_Union[WorkerRates, _Mapping]] = ...) -> None: ...

class WorkerRates(_message.Message):
    __slots__ = ("prefill_tokens_per_s", "decode_step_s", "queued_prefill_tokens", "push_bytes_per_s", "max_num_seqs")
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PUSH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens_per_s: float
    decode_step_s: float
    queued_prefill_tokens: int
    push_bytes_per_s: float
    max_num_seqs: int
    def __init__(self, prefill_tokens_per_s: _Optional[float] = ..., decode_step_s: _Optional[float] = ..., queued_prefill_tokens: _Optional[int] = ..., push_bytes_per_s: _Optional[float] = ..., max_num_seqs: _Optional[int] = ...) -> None: ...

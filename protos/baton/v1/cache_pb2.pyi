from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LookupPrefixRequest(_message.Message):
    __slots__ = ("block_hashes",)
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LookupPrefixResponse(_message.Message):
    __slots__ = ("num_stored_blocks", "holders")
    NUM_STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    num_stored_blocks: int
    holders: _containers.RepeatedCompositeFieldContainer[PrefixHolder]
    def __init__(self, num_stored_blocks: _Optional[int] = ..., holders: _Optional[_Iterable[_Union[PrefixHolder, _Mapping]]] = ...) -> None: ...

class PrefixHolder(_message.Message):
    __slots__ = ("worker_id", "num_blocks")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    num_blocks: int
    def __init__(self, worker_id: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class FetchBlocksRequest(_message.Message):
    __slots__ = ("block_hashes",)
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FetchBlocksResponse(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: BlockHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[BlockHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class BlockHeader(_message.Message):
    __slots__ = ("block_hash", "checksum", "layout", "position", "parent_hash")
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    block_hash: bytes
    checksum: int
    layout: _common_pb2.KvLayout
    position: int
    parent_hash: bytes
    def __init__(self, block_hash: _Optional[bytes] = ..., checksum: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., position: _Optional[int] = ..., parent_hash: _Optional[bytes] = ...) -> None: ...

class StoreBlocksRequest(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: BlockHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[BlockHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class StoreBlocksResponse(_message.Message):
    __slots__ = ("num_stored", "num_skipped")
    NUM_STORED_FIELD_NUMBER: _ClassVar[int]
    NUM_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    num_stored: int
    num_skipped: int
    def __init__(self, num_stored: _Optional[int] = ..., num_skipped: _Optional[int] = ...) -> None: ...

class DropBlocksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropBlocksResponse(_message.Message):
    __slots__ = ("num_dropped",)
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    num_dropped: int
    def __init__(self, num_dropped: _Optional[int] = ...) -> None: ...

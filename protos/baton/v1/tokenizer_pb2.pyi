from baton.v1 import common_pb2 as _common_pb2
from baton.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("model", "text", "chat")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    chat: _inference_pb2.ChatPrompt
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[_inference_pb2.ChatPrompt, _Mapping]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("token_ids", "tokenizer_hash", "model")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokenizer_hash: str
    model: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., tokenizer_hash: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class DecodeTextRequest(_message.Message):
    __slots__ = ("model", "token_ids", "keep_special_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    KEEP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    keep_special_tokens: bool
    def __init__(self, model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., keep_special_tokens: bool = ...) -> None: ...

class DecodeTextResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class OpenTextStream(_message.Message):
    __slots__ = ("model", "stop", "keep_special_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    KEEP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    stop: _containers.RepeatedScalarFieldContainer[str]
    keep_special_tokens: bool
    def __init__(self, model: _Optional[str] = ..., stop: _Optional[_Iterable[str]] = ..., keep_special_tokens: bool = ...) -> None: ...

class StreamTextRequest(_message.Message):
    __slots__ = ("stream_id", "open", "token_ids", "flush", "describe_token_ids")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    open: OpenTextStream
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    flush: bool
    describe_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stream_id: _Optional[int] = ..., open: _Optional[_Union[OpenTextStream, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., flush: bool = ..., describe_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamTextResponse(_message.Message):
    __slots__ = ("stream_id", "text", "stop", "num_tokens", "token_texts", "error_reason", "error_message")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    text: str
    stop: str
    num_tokens: int
    token_texts: _containers.RepeatedCompositeFieldContainer[TokenText]
    error_reason: _common_pb2.ErrorReason
    error_message: str
    def __init__(self, stream_id: _Optional[int] = ..., text: _Optional[str] = ..., stop: _Optional[str] = ..., num_tokens: _Optional[int] = ..., token_texts: _Optional[_Iterable[_Union[TokenText, _Mapping]]] = ..., error_reason: _Optional[_Union[_common_pb2.ErrorReason, str]] = ..., error_message: _Optional[str] = ...) -> None: ...

class TokenText(_message.Message):
    __slots__ = ("token_bytes", "text")
    TOKEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_bytes: bytes
    text: str
    def __init__(self, token_bytes: _Optional[bytes] = ..., text: _Optional[str] = ...) -> None: ...

class GetTokenizerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerInfoResponse(_message.Message):
    __slots__ = ("tokenizers",)
    TOKENIZERS_FIELD_NUMBER: _ClassVar[int]
    tokenizers: _containers.RepeatedCompositeFieldContainer[TokenizerInfo]
    def __init__(self, tokenizers: _Optional[_Iterable[_Union[TokenizerInfo, _Mapping]]] = ...) -> None: ...

class TokenizerInfo(_message.Message):
    __slots__ = ("model", "tokenizer_hash", "vocab_size", "eos_token_ids", "has_chat_template")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    model: str
    tokenizer_hash: str
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_chat_template: bool
    def __init__(self, model: _Optional[str] = ..., tokenizer_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_chat_template: bool = ...) -> None: ...

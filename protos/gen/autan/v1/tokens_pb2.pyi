from protos.gen.autan.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenBatch(_message.Message):
    __slots__ = ("instance_id", "incarnation", "requests")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: int
    requests: _containers.RepeatedCompositeFieldContainer[RequestTokens]
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[RequestTokens, _Mapping]]] = ...) -> None: ...

class RequestTokens(_message.Message):
    __slots__ = ("request_id", "epoch", "first_index", "token_ids", "finish", "timeline", "logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    first_index: int
    token_ids: bytes
    finish: _common_pb2.FinishReason
    timeline: _common_pb2.Timeline
    logprobs: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., finish: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., timeline: _Optional[_Union[_common_pb2.Timeline, _Mapping]] = ..., logprobs: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TokenAcks(_message.Message):
    __slots__ = ("acks",)
    ACKS_FIELD_NUMBER: _ClassVar[int]
    acks: _containers.RepeatedCompositeFieldContainer[TokenAck]
    def __init__(self, acks: _Optional[_Iterable[_Union[TokenAck, _Mapping]]] = ...) -> None: ...

class TokenAck(_message.Message):
    __slots__ = ("request_id", "epoch", "next_index", "finished", "stale")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    next_index: int
    finished: bool
    stale: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., next_index: _Optional[int] = ..., finished: _Optional[bool] = ..., stale: _Optional[bool] = ...) -> None: ...

from protos.gen.autan.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_ENCODING_NONE: _ClassVar[KvEncoding]
    KV_ENCODING_LOSSLESS: _ClassVar[KvEncoding]
    KV_ENCODING_FP8: _ClassVar[KvEncoding]
KV_ENCODING_NONE: KvEncoding
KV_ENCODING_LOSSLESS: KvEncoding
KV_ENCODING_FP8: KvEncoding

class Capability(_message.Message):
    __slots__ = ("mac", "expires_at_ms", "most_blocks")
    MAC_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    MOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    mac: bytes
    expires_at_ms: int
    most_blocks: int
    def __init__(self, mac: _Optional[bytes] = ..., expires_at_ms: _Optional[int] = ..., most_blocks: _Optional[int] = ...) -> None: ...

class SharedPool(_message.Message):
    __slots__ = ("host", "pid", "fd", "key", "size_bytes")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    host: str
    pid: int
    fd: int
    key: bytes
    size_bytes: int
    def __init__(self, host: _Optional[str] = ..., pid: _Optional[int] = ..., fd: _Optional[int] = ..., key: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class SharedPoolAnswer(_message.Message):
    __slots__ = ("mapped", "why_not")
    MAPPED_FIELD_NUMBER: _ClassVar[int]
    WHY_NOT_FIELD_NUMBER: _ClassVar[int]
    mapped: bool
    why_not: str
    def __init__(self, mapped: _Optional[bool] = ..., why_not: _Optional[str] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "source_instance", "source_incarnation", "target_instance", "target_incarnation", "fingerprint", "num_tokens", "num_blocks", "block_hashes", "layers_per_group", "capability", "deadline_s", "streams", "shared_pool", "offer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TARGET_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_PER_GROUP_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    SHARED_POOL_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    source_instance: str
    source_incarnation: int
    target_instance: str
    target_incarnation: int
    fingerprint: _common_pb2.Fingerprint
    num_tokens: int
    num_blocks: int
    block_hashes: bytes
    layers_per_group: int
    capability: Capability
    deadline_s: float
    streams: int
    shared_pool: SharedPool
    offer: KvOffer
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., source_instance: _Optional[str] = ..., source_incarnation: _Optional[int] = ..., target_instance: _Optional[str] = ..., target_incarnation: _Optional[int] = ..., fingerprint: _Optional[_Union[_common_pb2.Fingerprint, _Mapping]] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_hashes: _Optional[bytes] = ..., layers_per_group: _Optional[int] = ..., capability: _Optional[_Union[Capability, _Mapping]] = ..., deadline_s: _Optional[float] = ..., streams: _Optional[int] = ..., shared_pool: _Optional[_Union[SharedPool, _Mapping]] = ..., offer: _Optional[_Union[KvOffer, _Mapping]] = ...) -> None: ...

class KvOffer(_message.Message):
    __slots__ = ("encodings", "inexact")
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    INEXACT_FIELD_NUMBER: _ClassVar[int]
    encodings: _containers.RepeatedScalarFieldContainer[KvEncoding]
    inexact: bool
    def __init__(self, encodings: _Optional[_Iterable[_Union[KvEncoding, str]]] = ..., inexact: _Optional[bool] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("transfer_id", "credit_bytes", "first_block", "encoding", "next_blocks", "shared_pool", "push_port")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    NEXT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARED_POOL_FIELD_NUMBER: _ClassVar[int]
    PUSH_PORT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    credit_bytes: int
    first_block: int
    encoding: KvEncoding
    next_blocks: _containers.RepeatedScalarFieldContainer[int]
    shared_pool: SharedPoolAnswer
    push_port: int
    def __init__(self, transfer_id: _Optional[str] = ..., credit_bytes: _Optional[int] = ..., first_block: _Optional[int] = ..., encoding: _Optional[_Union[KvEncoding, str]] = ..., next_blocks: _Optional[_Iterable[int]] = ..., shared_pool: _Optional[_Union[SharedPoolAnswer, _Mapping]] = ..., push_port: _Optional[int] = ...) -> None: ...

class PushFrame(_message.Message):
    __slots__ = ("transfer_id", "epoch", "end", "stream", "blocks", "payload")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    end: EndFrame
    stream: int
    blocks: BlockFrames
    payload: bytes
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., end: _Optional[_Union[EndFrame, _Mapping]] = ..., stream: _Optional[int] = ..., blocks: _Optional[_Union[BlockFrames, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class BlockFrames(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[BlockFrame]
    def __init__(self, parts: _Optional[_Iterable[_Union[BlockFrame, _Mapping]]] = ...) -> None: ...

class BlockFrame(_message.Message):
    __slots__ = ("block_index", "layer_group", "offset_bytes", "payload_bytes", "digest", "encoding", "pool_offset", "pool_bytes")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYER_GROUP_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    POOL_OFFSET_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    layer_group: int
    offset_bytes: int
    payload_bytes: int
    digest: bytes
    encoding: KvEncoding
    pool_offset: int
    pool_bytes: int
    def __init__(self, block_index: _Optional[int] = ..., layer_group: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., encoding: _Optional[_Union[KvEncoding, str]] = ..., pool_offset: _Optional[int] = ..., pool_bytes: _Optional[int] = ...) -> None: ...

class EndFrame(_message.Message):
    __slots__ = ("num_tokens", "next_token_ids", "first_output_index", "timeline", "since_prefill_s", "next_logprobs", "digest")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    SINCE_PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    NEXT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    next_token_ids: bytes
    first_output_index: int
    timeline: _common_pb2.Timeline
    since_prefill_s: float
    next_logprobs: _containers.RepeatedScalarFieldContainer[bytes]
    digest: bytes
    def __init__(self, num_tokens: _Optional[int] = ..., next_token_ids: _Optional[bytes] = ..., first_output_index: _Optional[int] = ..., timeline: _Optional[_Union[_common_pb2.Timeline, _Mapping]] = ..., since_prefill_s: _Optional[float] = ..., next_logprobs: _Optional[_Iterable[bytes]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("credit_bytes", "commit", "refused")
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    credit_bytes: int
    commit: Commit
    refused: _common_pb2.ErrorDetail
    def __init__(self, credit_bytes: _Optional[int] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., refused: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("epoch", "blocks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    blocks: int
    def __init__(self, epoch: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("transfer_id", "request_id", "epoch", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    request_id: str
    epoch: int
    reason: str
    def __init__(self, transfer_id: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

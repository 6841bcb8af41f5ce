from protos.gen.autan.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvEntry(_message.Message):
    __slots__ = ("request_id", "epoch", "owner", "stage", "blocks", "writer", "age_s", "lease_left_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    owner: str
    stage: str
    blocks: int
    writer: str
    age_s: float
    lease_left_s: float
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., owner: _Optional[str] = ..., stage: _Optional[str] = ..., blocks: _Optional[int] = ..., writer: _Optional[str] = ..., age_s: _Optional[float] = ..., lease_left_s: _Optional[float] = ...) -> None: ...

class KvBooks(_message.Message):
    __slots__ = ("instance_id", "incarnation", "total_blocks", "used_blocks", "cached_blocks", "free_blocks", "leaked_blocks", "overdue_blocks", "opened", "released", "entries", "pid", "address", "host_blocks", "host_bytes", "disk_blocks", "disk_bytes")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEAKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OVERDUE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: int
    total_blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    leaked_blocks: int
    overdue_blocks: int
    opened: int
    released: int
    entries: _containers.RepeatedCompositeFieldContainer[KvEntry]
    pid: int
    address: str
    host_blocks: int
    host_bytes: int
    disk_blocks: int
    disk_bytes: int
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., total_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., leaked_blocks: _Optional[int] = ..., overdue_blocks: _Optional[int] = ..., opened: _Optional[int] = ..., released: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[KvEntry, _Mapping]]] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., host_blocks: _Optional[int] = ..., host_bytes: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., disk_bytes: _Optional[int] = ...) -> None: ...

class KvFinding(_message.Message):
    __slots__ = ("kind", "request_id", "epoch", "blocks", "detail")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    kind: str
    request_id: str
    epoch: int
    blocks: int
    detail: str
    def __init__(self, kind: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., blocks: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class KvAudit(_message.Message):
    __slots__ = ("books", "findings", "took_s", "disk_checked")
    BOOKS_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    DISK_CHECKED_FIELD_NUMBER: _ClassVar[int]
    books: KvBooks
    findings: _containers.RepeatedCompositeFieldContainer[KvFinding]
    took_s: float
    disk_checked: int
    def __init__(self, books: _Optional[_Union[KvBooks, _Mapping]] = ..., findings: _Optional[_Iterable[_Union[KvFinding, _Mapping]]] = ..., took_s: _Optional[float] = ..., disk_checked: _Optional[int] = ...) -> None: ...

class KvReturn(_message.Message):
    __slots__ = ("kind", "request_id", "epoch", "blocks", "why", "done", "kept_because", "path", "bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    KEPT_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    request_id: str
    epoch: int
    blocks: int
    why: str
    done: bool
    kept_because: str
    path: str
    bytes: int
    def __init__(self, kind: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., blocks: _Optional[int] = ..., why: _Optional[str] = ..., done: _Optional[bool] = ..., kept_because: _Optional[str] = ..., path: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class KvCollection(_message.Message):
    __slots__ = ("instance_id", "incarnation", "applied", "returns")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: int
    applied: bool
    returns: _containers.RepeatedCompositeFieldContainer[KvReturn]
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., applied: _Optional[bool] = ..., returns: _Optional[_Iterable[_Union[KvReturn, _Mapping]]] = ...) -> None: ...

class PeerProbe(_message.Message):
    __slots__ = ("instance_id", "address", "reachable", "rtt_s", "error", "is_expected", "differing", "shared_memory", "clock_offset_s")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    IS_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    DIFFERING_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    CLOCK_OFFSET_S_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    address: str
    reachable: bool
    rtt_s: float
    error: str
    is_expected: bool
    differing: _containers.RepeatedScalarFieldContainer[str]
    shared_memory: bool
    clock_offset_s: float
    def __init__(self, instance_id: _Optional[str] = ..., address: _Optional[str] = ..., reachable: _Optional[bool] = ..., rtt_s: _Optional[float] = ..., error: _Optional[str] = ..., is_expected: _Optional[bool] = ..., differing: _Optional[_Iterable[str]] = ..., shared_memory: _Optional[bool] = ..., clock_offset_s: _Optional[float] = ...) -> None: ...

class SelfReport(_message.Message):
    __slots__ = ("instance_id", "incarnation", "version", "python", "protocol_version", "fingerprint", "wall_clock_s", "store_reachable", "store_rtt_s", "store_offset_s", "shared_memory", "peers")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WALL_CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    STORE_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    STORE_RTT_S_FIELD_NUMBER: _ClassVar[int]
    STORE_OFFSET_S_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: int
    version: str
    python: str
    protocol_version: int
    fingerprint: _common_pb2.Fingerprint
    wall_clock_s: float
    store_reachable: bool
    store_rtt_s: float
    store_offset_s: float
    shared_memory: str
    peers: _containers.RepeatedCompositeFieldContainer[PeerProbe]
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., version: _Optional[str] = ..., python: _Optional[str] = ..., protocol_version: _Optional[int] = ..., fingerprint: _Optional[_Union[_common_pb2.Fingerprint, _Mapping]] = ..., wall_clock_s: _Optional[float] = ..., store_reachable: _Optional[bool] = ..., store_rtt_s: _Optional[float] = ..., store_offset_s: _Optional[float] = ..., shared_memory: _Optional[str] = ..., peers: _Optional[_Iterable[_Union[PeerProbe, _Mapping]]] = ...) -> None: ...

from protos.gen.autan.v1 import audit_pb2 as _audit_pb2
from protos.gen.autan.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatusReply(_message.Message):
    __slots__ = ("card", "incarnation", "state", "stats", "ledger", "pid")
    CARD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    card: _common_pb2.InstanceCard
    incarnation: int
    state: _common_pb2.InstanceState
    stats: _common_pb2.InstanceStats
    ledger: _containers.RepeatedScalarFieldContainer[str]
    pid: int
    def __init__(self, card: _Optional[_Union[_common_pb2.InstanceCard, _Mapping]] = ..., incarnation: _Optional[int] = ..., state: _Optional[_Union[_common_pb2.InstanceState, str]] = ..., stats: _Optional[_Union[_common_pb2.InstanceStats, _Mapping]] = ..., ledger: _Optional[_Iterable[str]] = ..., pid: _Optional[int] = ...) -> None: ...

class RankBeat(_message.Message):
    __slots__ = ("group", "rank", "pid", "loaded")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    group: str
    rank: int
    pid: int
    loaded: bool
    def __init__(self, group: _Optional[str] = ..., rank: _Optional[int] = ..., pid: _Optional[int] = ..., loaded: _Optional[bool] = ...) -> None: ...

class GroupBeat(_message.Message):
    __slots__ = ("incarnation", "link_address", "link_token")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LINK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    link_address: str
    link_token: bytes
    def __init__(self, incarnation: _Optional[int] = ..., link_address: _Optional[str] = ..., link_token: _Optional[bytes] = ...) -> None: ...

class WorkerListKvRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerVerifyKvRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerCollectKvRequest(_message.Message):
    __slots__ = ("apply", "cache_owners")
    APPLY_FIELD_NUMBER: _ClassVar[int]
    CACHE_OWNERS_FIELD_NUMBER: _ClassVar[int]
    apply: bool
    cache_owners: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, apply: _Optional[bool] = ..., cache_owners: _Optional[_Iterable[str]] = ...) -> None: ...

class PeerAddress(_message.Message):
    __slots__ = ("instance_id", "address", "incarnation")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    address: str
    incarnation: int
    def __init__(self, instance_id: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class WorkerDiagnoseRequest(_message.Message):
    __slots__ = ("peers", "sink_address", "timeout_s")
    PEERS_FIELD_NUMBER: _ClassVar[int]
    SINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[PeerAddress]
    sink_address: str
    timeout_s: float
    def __init__(self, peers: _Optional[_Iterable[_Union[PeerAddress, _Mapping]]] = ..., sink_address: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class WatchCacheRequest(_message.Message):
    __slots__ = ("incarnation", "after_event")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    AFTER_EVENT_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    after_event: int
    def __init__(self, incarnation: _Optional[int] = ..., after_event: _Optional[int] = ...) -> None: ...

class CacheNews(_message.Message):
    __slots__ = ("incarnation", "snapshot", "events")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    snapshot: CacheSnapshot
    events: CacheEvents
    def __init__(self, incarnation: _Optional[int] = ..., snapshot: _Optional[_Union[CacheSnapshot, _Mapping]] = ..., events: _Optional[_Union[CacheEvents, _Mapping]] = ...) -> None: ...

class CacheSnapshot(_message.Message):
    __slots__ = ("event", "names", "first", "last")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    event: int
    names: bytes
    first: bool
    last: bool
    def __init__(self, event: _Optional[int] = ..., names: _Optional[bytes] = ..., first: _Optional[bool] = ..., last: _Optional[bool] = ...) -> None: ...

class CacheEvents(_message.Message):
    __slots__ = ("first_event", "changes")
    FIRST_EVENT_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    first_event: int
    changes: _containers.RepeatedCompositeFieldContainer[CacheChange]
    def __init__(self, first_event: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[CacheChange, _Mapping]]] = ...) -> None: ...

class CacheChange(_message.Message):
    __slots__ = ("stored", "removed")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    stored: bytes
    removed: bytes
    def __init__(self, stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...

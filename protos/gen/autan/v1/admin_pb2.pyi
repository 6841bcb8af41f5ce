from protos.gen.autan.v1 import audit_pb2 as _audit_pb2
from protos.gen.autan.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Health(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEALTH_UNSPECIFIED: _ClassVar[Health]
    HEALTH_OK: _ClassVar[Health]
    HEALTH_WARNING: _ClassVar[Health]
    HEALTH_BROKEN: _ClassVar[Health]
HEALTH_UNSPECIFIED: Health
HEALTH_OK: Health
HEALTH_WARNING: Health
HEALTH_BROKEN: Health

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("instance_id", "role", "state", "epoch", "address", "node", "card", "stats", "heartbeat_age_s", "assigned_requests", "reserved_blocks", "apart_from", "differing", "moves_in", "moves_out")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    APART_FROM_FIELD_NUMBER: _ClassVar[int]
    DIFFERING_FIELD_NUMBER: _ClassVar[int]
    MOVES_IN_FIELD_NUMBER: _ClassVar[int]
    MOVES_OUT_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: _common_pb2.Role
    state: _common_pb2.InstanceState
    epoch: int
    address: str
    node: str
    card: _common_pb2.InstanceCard
    stats: _common_pb2.InstanceStats
    heartbeat_age_s: float
    assigned_requests: int
    reserved_blocks: int
    apart_from: str
    differing: _containers.RepeatedScalarFieldContainer[str]
    moves_in: int
    moves_out: int
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., state: _Optional[_Union[_common_pb2.InstanceState, str]] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., card: _Optional[_Union[_common_pb2.InstanceCard, _Mapping]] = ..., stats: _Optional[_Union[_common_pb2.InstanceStats, _Mapping]] = ..., heartbeat_age_s: _Optional[float] = ..., assigned_requests: _Optional[int] = ..., reserved_blocks: _Optional[int] = ..., apart_from: _Optional[str] = ..., differing: _Optional[_Iterable[str]] = ..., moves_in: _Optional[int] = ..., moves_out: _Optional[int] = ...) -> None: ...

class MoveRecord(_message.Message):
    __slots__ = ("age_s", "event", "request_id", "epoch", "source", "target", "why", "note")
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    age_s: float
    event: str
    request_id: str
    epoch: int
    source: str
    target: str
    why: str
    note: str
    def __init__(self, age_s: _Optional[float] = ..., event: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., source: _Optional[str] = ..., target: _Optional[str] = ..., why: _Optional[str] = ..., note: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("cluster", "version", "instances", "queued", "running", "finished", "failed", "cancelled", "leader", "leader_epoch", "store_reachable", "counters", "moves", "moves_begun", "moves_done", "moves_stayed")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORE_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    MOVES_BEGUN_FIELD_NUMBER: _ClassVar[int]
    MOVES_DONE_FIELD_NUMBER: _ClassVar[int]
    MOVES_STAYED_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    version: str
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    queued: int
    running: int
    finished: int
    failed: int
    cancelled: int
    leader: str
    leader_epoch: int
    store_reachable: bool
    counters: _containers.ScalarMap[str, int]
    moves: _containers.RepeatedCompositeFieldContainer[MoveRecord]
    moves_begun: int
    moves_done: int
    moves_stayed: int
    def __init__(self, cluster: _Optional[str] = ..., version: _Optional[str] = ..., instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., queued: _Optional[int] = ..., running: _Optional[int] = ..., finished: _Optional[int] = ..., failed: _Optional[int] = ..., cancelled: _Optional[int] = ..., leader: _Optional[str] = ..., leader_epoch: _Optional[int] = ..., store_reachable: _Optional[bool] = ..., counters: _Optional[_Mapping[str, int]] = ..., moves: _Optional[_Iterable[_Union[MoveRecord, _Mapping]]] = ..., moves_begun: _Optional[int] = ..., moves_done: _Optional[int] = ..., moves_stayed: _Optional[int] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class RequestStatus(_message.Message):
    __slots__ = ("request_id", "tenant", "state", "epoch", "prompt_tokens", "completion_tokens", "prefill_instance", "decode_instance", "age_s", "attempts")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    state: str
    epoch: int
    prompt_tokens: int
    completion_tokens: int
    prefill_instance: str
    decode_instance: str
    age_s: float
    attempts: int
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., state: _Optional[str] = ..., epoch: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., prefill_instance: _Optional[str] = ..., decode_instance: _Optional[str] = ..., age_s: _Optional[float] = ..., attempts: _Optional[int] = ...) -> None: ...

class ListRequestsReply(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RequestStatus]
    def __init__(self, requests: _Optional[_Iterable[_Union[RequestStatus, _Mapping]]] = ...) -> None: ...

class AdminCancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AdminCancelReply(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("request_id", "target_instance")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    target_instance: str
    def __init__(self, request_id: _Optional[str] = ..., target_instance: _Optional[str] = ...) -> None: ...

class MigrateReply(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("instance_id", "on")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    on: bool
    def __init__(self, instance_id: _Optional[str] = ..., on: _Optional[bool] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("moving",)
    MOVING_FIELD_NUMBER: _ClassVar[int]
    moving: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, moving: _Optional[_Iterable[str]] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Unanswered(_message.Message):
    __slots__ = ("instance_id", "address", "error")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    address: str
    error: _common_pb2.ErrorDetail
    def __init__(self, instance_id: _Optional[str] = ..., address: _Optional[str] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class ListKvRequest(_message.Message):
    __slots__ = ("instance_ids",)
    INSTANCE_IDS_FIELD_NUMBER: _ClassVar[int]
    instance_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, instance_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ListKvReply(_message.Message):
    __slots__ = ("books", "unanswered")
    BOOKS_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    books: _containers.RepeatedCompositeFieldContainer[_audit_pb2.KvBooks]
    unanswered: _containers.RepeatedCompositeFieldContainer[Unanswered]
    def __init__(self, books: _Optional[_Iterable[_Union[_audit_pb2.KvBooks, _Mapping]]] = ..., unanswered: _Optional[_Iterable[_Union[Unanswered, _Mapping]]] = ...) -> None: ...

class VerifyKvRequest(_message.Message):
    __slots__ = ("instance_ids",)
    INSTANCE_IDS_FIELD_NUMBER: _ClassVar[int]
    instance_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, instance_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class VerifyKvReply(_message.Message):
    __slots__ = ("audits", "unanswered")
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    audits: _containers.RepeatedCompositeFieldContainer[_audit_pb2.KvAudit]
    unanswered: _containers.RepeatedCompositeFieldContainer[Unanswered]
    def __init__(self, audits: _Optional[_Iterable[_Union[_audit_pb2.KvAudit, _Mapping]]] = ..., unanswered: _Optional[_Iterable[_Union[Unanswered, _Mapping]]] = ...) -> None: ...

class CollectKvRequest(_message.Message):
    __slots__ = ("instance_ids", "apply")
    INSTANCE_IDS_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    instance_ids: _containers.RepeatedScalarFieldContainer[str]
    apply: bool
    def __init__(self, instance_ids: _Optional[_Iterable[str]] = ..., apply: _Optional[bool] = ...) -> None: ...

class CollectKvReply(_message.Message):
    __slots__ = ("collections", "unanswered")
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    collections: _containers.RepeatedCompositeFieldContainer[_audit_pb2.KvCollection]
    unanswered: _containers.RepeatedCompositeFieldContainer[Unanswered]
    def __init__(self, collections: _Optional[_Iterable[_Union[_audit_pb2.KvCollection, _Mapping]]] = ..., unanswered: _Optional[_Iterable[_Union[Unanswered, _Mapping]]] = ...) -> None: ...

class DiagnoseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Check(_message.Message):
    __slots__ = ("health", "name", "subject", "detail")
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    health: Health
    name: str
    subject: str
    detail: str
    def __init__(self, health: _Optional[_Union[Health, str]] = ..., name: _Optional[str] = ..., subject: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class DiagnoseReply(_message.Message):
    __slots__ = ("cluster", "version", "wall_clock_s", "from_ingress", "workers", "unanswered", "checks")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WALL_CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    FROM_INGRESS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    version: str
    wall_clock_s: float
    from_ingress: _containers.RepeatedCompositeFieldContainer[_audit_pb2.PeerProbe]
    workers: _containers.RepeatedCompositeFieldContainer[_audit_pb2.SelfReport]
    unanswered: _containers.RepeatedCompositeFieldContainer[Unanswered]
    checks: _containers.RepeatedCompositeFieldContainer[Check]
    def __init__(self, cluster: _Optional[str] = ..., version: _Optional[str] = ..., wall_clock_s: _Optional[float] = ..., from_ingress: _Optional[_Iterable[_Union[_audit_pb2.PeerProbe, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[_audit_pb2.SelfReport, _Mapping]]] = ..., unanswered: _Optional[_Iterable[_Union[Unanswered, _Mapping]]] = ..., checks: _Optional[_Iterable[_Union[Check, _Mapping]]] = ...) -> None: ...

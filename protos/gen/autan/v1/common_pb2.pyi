from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_COMBINED: _ClassVar[Role]

class InstanceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INSTANCE_STATE_UNSPECIFIED: _ClassVar[InstanceState]
    INSTANCE_STATE_STARTING: _ClassVar[InstanceState]
    INSTANCE_STATE_READY: _ClassVar[InstanceState]
    INSTANCE_STATE_DRAINING: _ClassVar[InstanceState]
    INSTANCE_STATE_LOST: _ClassVar[InstanceState]
    INSTANCE_STATE_STOPPED: _ClassVar[InstanceState]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_COMBINED: Role
INSTANCE_STATE_UNSPECIFIED: InstanceState
INSTANCE_STATE_STARTING: InstanceState
INSTANCE_STATE_READY: InstanceState
INSTANCE_STATE_DRAINING: InstanceState
INSTANCE_STATE_LOST: InstanceState
INSTANCE_STATE_STOPPED: InstanceState
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("json_schema", "regex", "lark", "json_object")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    LARK_FIELD_NUMBER: _ClassVar[int]
    JSON_OBJECT_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    lark: str
    json_object: bool
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., lark: _Optional[str] = ..., json_object: _Optional[bool] = ...) -> None: ...

class RequestSpec(_message.Message):
    __slots__ = ("request_id", "tenant", "model", "prompt_token_ids", "sampling", "cache_salt", "submitted_at_ms", "eos_token_ids", "priority", "grammar", "stop")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    model: str
    prompt_token_ids: bytes
    sampling: Sampling
    cache_salt: bytes
    submitted_at_ms: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    grammar: Grammar
    stop: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., cache_salt: _Optional[bytes] = ..., submitted_at_ms: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("code", "reason", "message", "retryable", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: str
    reason: str
    message: str
    retryable: bool
    retry_after_s: float
    def __init__(self, code: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("model", "architecture", "weights_digest", "tokenizer_digest", "dtype", "block_tokens", "num_layers", "row_bytes", "kv_layout", "protocol_version", "template_digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    architecture: str
    weights_digest: str
    tokenizer_digest: str
    dtype: str
    block_tokens: int
    num_layers: int
    row_bytes: int
    kv_layout: str
    protocol_version: int
    template_digest: str
    def __init__(self, model: _Optional[str] = ..., architecture: _Optional[str] = ..., weights_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., block_tokens: _Optional[int] = ..., num_layers: _Optional[int] = ..., row_bytes: _Optional[int] = ..., kv_layout: _Optional[str] = ..., protocol_version: _Optional[int] = ..., template_digest: _Optional[str] = ...) -> None: ...

class InstanceCard(_message.Message):
    __slots__ = ("instance_id", "role", "address", "fingerprint", "total_blocks", "vocab_size", "context_tokens", "max_batch_tokens", "max_running", "node", "ranks")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: Role
    address: str
    fingerprint: Fingerprint
    total_blocks: int
    vocab_size: int
    context_tokens: int
    max_batch_tokens: int
    max_running: int
    node: str
    ranks: int
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., total_blocks: _Optional[int] = ..., vocab_size: _Optional[int] = ..., context_tokens: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_running: _Optional[int] = ..., node: _Optional[str] = ..., ranks: _Optional[int] = ...) -> None: ...

class InstanceStats(_message.Message):
    __slots__ = ("total_blocks", "used_blocks", "cached_blocks", "free_blocks", "running", "waiting", "holding", "importing", "steps", "prefill_chunks", "prefill_tokens", "prefix_hit_tokens", "decode_tokens", "preemptions", "kv_blocks_sent", "kv_bytes_sent", "kv_blocks_received", "kv_bytes_received", "handoffs_committed", "handoffs_failed", "stale_refused", "leaked_blocks", "unacked_tokens", "expert_visits", "host_blocks", "host_restored_tokens", "fetched_blocks", "fetched_bytes", "fetches", "fetches_failed", "lent_blocks", "lent_bytes", "prefill_tokens_per_s", "host_bytes", "disk_blocks", "disk_bytes", "disk_restored_tokens", "corrupt_blocks", "tier_errors", "tier_off_reason", "restoring")
    class FetchesFailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    IMPORTING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_SENT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FAILED_FIELD_NUMBER: _ClassVar[int]
    STALE_REFUSED_FIELD_NUMBER: _ClassVar[int]
    LEAKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UNACKED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_VISITS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FAILED_FIELD_NUMBER: _ClassVar[int]
    LENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIER_OFF_REASON_FIELD_NUMBER: _ClassVar[int]
    RESTORING_FIELD_NUMBER: _ClassVar[int]
    total_blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    running: int
    waiting: int
    holding: int
    importing: int
    steps: int
    prefill_chunks: int
    prefill_tokens: int
    prefix_hit_tokens: int
    decode_tokens: int
    preemptions: int
    kv_blocks_sent: int
    kv_bytes_sent: int
    kv_blocks_received: int
    kv_bytes_received: int
    handoffs_committed: int
    handoffs_failed: int
    stale_refused: int
    leaked_blocks: int
    unacked_tokens: int
    expert_visits: _containers.RepeatedScalarFieldContainer[int]
    host_blocks: int
    host_restored_tokens: int
    fetched_blocks: int
    fetched_bytes: int
    fetches: int
    fetches_failed: _containers.ScalarMap[str, int]
    lent_blocks: int
    lent_bytes: int
    prefill_tokens_per_s: float
    host_bytes: int
    disk_blocks: int
    disk_bytes: int
    disk_restored_tokens: int
    corrupt_blocks: int
    tier_errors: int
    tier_off_reason: str
    restoring: int
    def __init__(self, total_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., holding: _Optional[int] = ..., importing: _Optional[int] = ..., steps: _Optional[int] = ..., prefill_chunks: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., decode_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., kv_blocks_sent: _Optional[int] = ..., kv_bytes_sent: _Optional[int] = ..., kv_blocks_received: _Optional[int] = ..., kv_bytes_received: _Optional[int] = ..., handoffs_committed: _Optional[int] = ..., handoffs_failed: _Optional[int] = ..., stale_refused: _Optional[int] = ..., leaked_blocks: _Optional[int] = ..., unacked_tokens: _Optional[int] = ..., expert_visits: _Optional[_Iterable[int]] = ..., host_blocks: _Optional[int] = ..., host_restored_tokens: _Optional[int] = ..., fetched_blocks: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., fetches: _Optional[int] = ..., fetches_failed: _Optional[_Mapping[str, int]] = ..., lent_blocks: _Optional[int] = ..., lent_bytes: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., host_bytes: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., disk_restored_tokens: _Optional[int] = ..., corrupt_blocks: _Optional[int] = ..., tier_errors: _Optional[int] = ..., tier_off_reason: _Optional[str] = ..., restoring: _Optional[int] = ...) -> None: ...

class Timeline(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "prefill_chunks", "cached_tokens", "handoff_blocks", "handoff_reused_blocks", "handoff_bytes", "handoff_s", "handoff_exposed_s", "prefill_instance", "decode_instance", "attempts", "ttft_s", "migrations", "migration_pause_s", "handoff_hidden_s", "fetched_tokens", "fetch_source", "fetch_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_REUSED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    MIGRATIONS_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    FETCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FETCH_SOURCE_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    prefill_chunks: int
    cached_tokens: int
    handoff_blocks: int
    handoff_reused_blocks: int
    handoff_bytes: int
    handoff_s: float
    handoff_exposed_s: float
    prefill_instance: str
    decode_instance: str
    attempts: int
    ttft_s: float
    migrations: int
    migration_pause_s: float
    handoff_hidden_s: float
    fetched_tokens: int
    fetch_source: str
    fetch_s: float
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., prefill_chunks: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., handoff_blocks: _Optional[int] = ..., handoff_reused_blocks: _Optional[int] = ..., handoff_bytes: _Optional[int] = ..., handoff_s: _Optional[float] = ..., handoff_exposed_s: _Optional[float] = ..., prefill_instance: _Optional[str] = ..., decode_instance: _Optional[str] = ..., attempts: _Optional[int] = ..., ttft_s: _Optional[float] = ..., migrations: _Optional[int] = ..., migration_pause_s: _Optional[float] = ..., handoff_hidden_s: _Optional[float] = ..., fetched_tokens: _Optional[int] = ..., fetch_source: _Optional[str] = ..., fetch_s: _Optional[float] = ...) -> None: ...

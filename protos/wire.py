"""The generated messages under short names, and the translations that both sides share.

Only this module and `protos.rpc` touch `protos.gen`.
"""

from __future__ import annotations

from protos.contract.errors import AutanError, error_from
from protos.gen.autan.v1 import (
    admin_pb2 as admin,
)
from protos.gen.autan.v1 import (
    audit_pb2 as audit,
)
from protos.gen.autan.v1 import (
    common_pb2 as common,
)
from protos.gen.autan.v1 import (
    inference_pb2 as inference,
)
from protos.gen.autan.v1 import (
    kv_pb2 as kv,
)
from protos.gen.autan.v1 import (
    store_pb2 as store,
)
from protos.gen.autan.v1 import (
    tokens_pb2 as tokens,
)
from protos.gen.autan.v1 import (
    worker_pb2 as worker,
)

__all__ = [
    "admin",
    "audit",
    "common",
    "differing_fields",
    "error_to_wire",
    "fingerprint_key",
    "inference",
    "kv",
    "store",
    "tokens",
    "wire_to_error",
    "worker",
]


def error_to_wire(error: AutanError) -> common.ErrorDetail:
    """An error as it travels."""
    return common.ErrorDetail(
        code=error.code,
        reason=error.reason,
        message=error.message,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
    )


def wire_to_error(detail: common.ErrorDetail) -> AutanError:
    """The error that a peer sent; an unknown reason becomes InternalError."""
    return error_from(detail.reason, detail.message, detail.retry_after_s)


def fingerprint_key(fingerprint: common.Fingerprint) -> str:
    """A fingerprint as one string: equal strings mean that KV may be handed over."""
    by_number = common.Fingerprint.DESCRIPTOR.fields_by_number
    names = [by_number[number].name for number in sorted(by_number)]
    return "|".join(f"{name}={getattr(fingerprint, name)!r}" for name in names)


def differing_fields(ours: common.Fingerprint, theirs: common.Fingerprint) -> list[str]:
    """`field: ours != theirs` for every field in which two fingerprints differ; empty when they agree."""
    return [
        f"{field.name}: {getattr(ours, field.name)!r} != {getattr(theirs, field.name)!r}"
        for field in common.Fingerprint.DESCRIPTOR.fields
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]

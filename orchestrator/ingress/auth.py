"""Who calls, and what they may call. Deny by default.

A key file is JSON: a list of `{"id", "sha256", "tenant", "role", "expires_at"}`. `sha256` is the hex digest of the key, `role`
is client or admin, `expires_at` (optional) an ISO 8601 time with a zone. The tenant of a call is that of its key, never
something that the caller says. Keys appear neither in logs nor in errors.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.ingress.clock import wall_clock_s
from protos.contract.errors import ConfigError, Forbidden, Unauthenticated
from protos.contract.redis_names import is_name

HEADER = "authorization"
_SCHEME = "bearer "
_MAX_KEY_CHARS = 512
_MAX_FILE_BYTES = 4 * 1024 * 1024
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_FIELDS = {"id", "sha256", "tenant", "role", "expires_at"}


class Role(StrEnum):
    """What a key may do. An admin may do what a client may."""

    CLIENT = "client"
    ADMIN = "admin"


METHOD_ROLES: Mapping[str, Role] = {
    "/autan.v1.Inference/Generate": Role.CLIENT,
    "/autan.v1.Inference/Cancel": Role.CLIENT,
    "/autan.v1.Inference/Resume": Role.CLIENT,
    "/autan.v1.Inference/Tokenize": Role.CLIENT,
    "/autan.v1.Inference/ListModels": Role.CLIENT,
    "/autan.v1.Admin/Status": Role.ADMIN,
    "/autan.v1.Admin/ListRequests": Role.ADMIN,
    "/autan.v1.Admin/CancelRequest": Role.ADMIN,
    "/autan.v1.Admin/Migrate": Role.ADMIN,
    "/autan.v1.Admin/Drain": Role.ADMIN,
    "/autan.v1.Admin/Shutdown": Role.ADMIN,
    "/autan.v1.Admin/ListKv": Role.ADMIN,
    "/autan.v1.Admin/VerifyKv": Role.ADMIN,
    "/autan.v1.Admin/CollectKv": Role.ADMIN,
    "/autan.v1.Admin/Diagnose": Role.ADMIN,
    "/grpc.health.v1.Health/Check": Role.CLIENT,
    "/grpc.health.v1.Health/List": Role.CLIENT,
    "/grpc.health.v1.Health/Watch": Role.CLIENT,
}
"""Every method that the client listener serves. A method that is not here is refused to everybody."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller behind a key."""

    key_id: str
    tenant: str
    role: Role


LOCAL = Principal("local", "local", Role.ADMIN)
"""Everybody on a listener without keys: only loopback and unix sockets have one."""


@dataclass(frozen=True, slots=True, repr=False)
class _Entry:
    principal: Principal
    digest: bytes
    expires_at_s: float | None


class Authoriser:
    """Decides on each call. Without a key file every caller is the local admin."""

    def __init__(self, entries: Sequence[_Entry] | None = None, wall_clock_s: Callable[[], float] = wall_clock_s) -> None:
        self._entries = None if entries is None else tuple(entries)
        self._wall_clock_s = wall_clock_s

    def __call__(self, method: str, metadata: Mapping[str, str]) -> Principal:
        """The caller. Raises Unauthenticated for no key, a wrong one or an expired one; Forbidden when the role does not do."""
        principal = LOCAL if self._entries is None else self._caller(self._entries, metadata)
        needed = METHOD_ROLES.get(method)
        if needed is None or (needed is Role.ADMIN and principal.role is not Role.ADMIN):
            raise Forbidden(f"{method}: the key {principal.key_id!r} does not reach this method")
        return principal

    def _caller(self, entries: Sequence[_Entry], metadata: Mapping[str, str]) -> Principal:
        value = metadata.get(HEADER, "")
        key = value[len(_SCHEME) :].strip()
        if not value.lower().startswith(_SCHEME) or not 0 < len(key) <= _MAX_KEY_CHARS:
            raise Unauthenticated("no API key: send the metadata `authorization: Bearer KEY`, or set AUTAN_API_KEY")
        digest = hashlib.sha256(key.encode()).digest()
        # Every entry is compared, so that the time taken does not say which one came close.
        found = [entry for entry in entries if hmac.compare_digest(entry.digest, digest)]
        if not found:
            raise Unauthenticated("the API key is not known here: check AUTAN_API_KEY, or ask for a new key")
        expires_at_s = found[0].expires_at_s
        if expires_at_s is not None and self._wall_clock_s() >= expires_at_s:
            raise Unauthenticated(f"the API key {found[0].principal.key_id!r} has expired: ask for a new one")
        return found[0].principal


def load_keys(path: Path, wall_clock_s: Callable[[], float] = wall_clock_s) -> Authoriser:
    """Reads a key file. Raises ConfigError, naming file and entry, for anything that is not exactly right."""
    try:
        if path.stat().st_mode & 0o022:
            raise ConfigError(f"{path}: others may write this key file; run chmod 600 on it")
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: the key file cannot be read ({error.strerror})") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: a key file has at most {_MAX_FILE_BYTES} bytes")
    try:
        listed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the key file is no valid JSON") from error
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{path}: a key file is a list with at least one key")
    entries = [_entry(f"{path}: key {index}", item) for index, item in enumerate(listed)]
    for name, values in (("id", [e.principal.key_id for e in entries]), ("sha256", [e.digest for e in entries])):
        if len(set(values)) != len(values):
            raise ConfigError(f"{path}: two keys have the same {name}")
    return Authoriser(entries, wall_clock_s)


def key_digest(key: str) -> str:
    """What a key file keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def _entry(where: str, item: Any) -> _Entry:
    if not isinstance(item, dict) or not _FIELDS - {"expires_at"} <= item.keys() <= _FIELDS:
        raise ConfigError(f"{where}: has the fields id, sha256, tenant and role, and expires_at if it ends")
    for field in ("id", "tenant"):
        if not isinstance(item[field], str) or not is_name(item[field]):
            raise ConfigError(f"{where}: {field} is not 1 to 64 characters of A-Z a-z 0-9 _ . -")
    if not isinstance(item["sha256"], str) or not _DIGEST.match(item["sha256"]):
        raise ConfigError(f"{where}: sha256 is not 64 lower-case hex digits; it is the digest of the key, not the key")
    if item["role"] not in list(Role):
        raise ConfigError(f"{where}: role is none of {', '.join(Role)}")
    principal = Principal(item["id"], item["tenant"], Role(item["role"]))
    return _Entry(principal, bytes.fromhex(item["sha256"]), _expiry(where, item.get("expires_at")))


def _expiry(where: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: expires_at is no ISO 8601 time") from error
    if moment.tzinfo is None:
        raise ConfigError(f"{where}: expires_at needs a zone, as in 2027-01-31T00:00:00Z")
    return moment.timestamp()

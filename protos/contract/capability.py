"""The capability of one hand-off: an HMAC over everything that the sender may claim, made with the assignment.

The orchestrator signs, the receiving worker checks; both read the keys from a file that only their user may read. The file
has one key a line, as hex: the first one signs, all of them are valid, so a key is replaced by putting another one before it
and dropping the old one once the capabilities that it signed have expired.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from protos.contract.errors import ConfigError, Unauthenticated

KEY_BYTES = 32
MAX_KEYS = 8
GRACE_MS = 10_000  # by which a capability outlives the request's deadline
_ID_BYTES = 4
_MAC_BYTES = _ID_BYTES + hashlib.sha256().digest_size


def expiry_ms(deadline_ms: int) -> int:
    """When the capabilities of a request with this deadline expire, Redis time.

    Later than the deadline itself: a request that runs out of time ends as EXPIRED by whoever watches its deadline, and
    a hand-off under way at that moment must not be mistaken for a forged one.
    """
    return deadline_ms + GRACE_MS


class GrantKind(StrEnum):
    """What is signed apart: no capability of one kind is one of the other, whatever its fields are."""

    HANDOFF = "autan hand-off capability 1"
    PREFIX = "autan prefix capability 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What one capability allows: these blocks of this request, from one process to another, until a time of Redis."""

    request_id: str
    epoch: int
    source_instance: str
    source_incarnation: int
    target_instance: str
    target_incarnation: int
    blocks: int
    kv_bytes: int
    expires_at_ms: int
    kind: GrantKind = GrantKind.HANDOFF

    def message(self) -> bytes:
        """What is signed: every field, lengths before texts, so that no two grants have the same bytes."""
        parts = [self.kind.value.encode()]
        for text in (self.request_id, self.source_instance, self.target_instance):
            raw = text.encode()
            parts += [struct.pack("<I", len(raw)), raw]
        for number in (
            self.epoch, self.source_incarnation, self.target_incarnation, self.blocks, self.kv_bytes, self.expires_at_ms,
        ):  # fmt: skip
            parts.append(number.to_bytes(16, "little", signed=True))
        return b"".join(parts)


class Keyring:
    """The valid keys, the signing one first. Their bytes appear in no text."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not 0 < len(keys) <= MAX_KEYS or any(len(key) != KEY_BYTES for key in keys):
            raise ConfigError(f"hand-off keys: 1 to {MAX_KEYS} keys of {KEY_BYTES} bytes are needed")
        self._keys = {_key_id(key): key for key in keys}
        self._signing = keys[0]

    def sign(self, grant: Grant) -> bytes:
        """The mac of a grant: the id of the key and the HMAC."""
        return _key_id(self._signing) + _mac(self._signing, grant)

    def knows(self, mac: bytes) -> bool:
        """True when the key that a mac names is one of these."""
        return mac[:_ID_BYTES] in self._keys

    def verify(self, grant: Grant, mac: bytes) -> None:
        """Raises Unauthenticated, with the reason, unless one of the keys signed exactly this. Takes the same time for all."""
        if not mac:
            raise Unauthenticated("no capability came along")
        key = self._keys.get(mac[:_ID_BYTES])
        if len(mac) != _MAC_BYTES or key is None:
            raise Unauthenticated("the capability is signed with a key that is not valid here")
        if not hmac.compare_digest(mac[_ID_BYTES:], _mac(key, grant)):
            raise Unauthenticated("the capability is not for this request, epoch, pair of instances, size and expiry")


def make_key_file(path: Path) -> None:
    """Makes the file with one fresh key, 0600, unless it is there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="ascii") as out:
        out.write(secrets.token_hex(KEY_BYTES) + "\n")


def rotate_key_file(path: Path) -> None:
    """Puts a fresh key first and keeps the one that signed until then; whole or not at all. Raises ConfigError."""
    signing = _lines(path)[0]
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as out:
        out.write(f"{secrets.token_hex(KEY_BYTES)}\n{signing}\n")
    temporary.replace(path)


def read_key_file(path: Path) -> Keyring:
    """The keys of a file. Raises ConfigError for one that cannot be read, that others may read, or that is damaged."""
    try:
        return Keyring([bytes.fromhex(line) for line in _lines(path)])
    except ValueError:
        raise ConfigError(f"{path}: a key is not hex; write one key of {2 * KEY_BYTES} hex digits a line") from None


class KeyFile:
    """The keys of a file, read again when the file changes. A file that cannot be used leaves the keys as they were."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _stamp(path)
        self._keys = read_key_file(path)

    @property
    def keys(self) -> Keyring:
        """The keys as the file has them."""
        stamp = _stamp(self._path)
        if stamp is not None and stamp != self._seen:
            try:
                self._keys = read_key_file(self._path)
            except ConfigError:
                return self._keys
            self._seen = stamp
        return self._keys


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"autan key id" + key).digest()[:_ID_BYTES]


def _mac(key: bytes, grant: Grant) -> bytes:
    return hmac.digest(key, grant.message(), "sha256")


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others may read these keys; run chmod 600 on it")
        lines = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the hand-off keys cannot be read ({error})") from error
    if not lines:
        raise ConfigError(f"{path}: has no key; remove the file, and the next start makes one")
    return lines


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size

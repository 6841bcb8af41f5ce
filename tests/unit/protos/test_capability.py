"""Capabilities: every field is signed, keys rotate without a gap, and key files are the user's own."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from protos.contract.capability import Grant, GrantKind, KeyFile, Keyring, make_key_file, read_key_file, rotate_key_file
from protos.contract.errors import ConfigError, Unauthenticated

GRANT = Grant(
    request_id="r1",
    epoch=3,
    source_instance="p-0",
    source_incarnation=2,
    target_instance="d-0",
    target_incarnation=5,
    blocks=4,
    kv_bytes=4096,
    expires_at_ms=1000,
)
OLD, NEW = b"o" * 32, b"n" * 32


@pytest.mark.parametrize("name", [field.name for field in fields(Grant)])
def test_every_field_is_signed(name: str) -> None:
    ring = Keyring([OLD])
    value = getattr(GRANT, name)
    changed = GrantKind.PREFIX if name == "kind" else value + (1 if isinstance(value, int) else "x")
    other = replace(GRANT, **{name: changed})
    ring.verify(GRANT, ring.sign(GRANT))
    with pytest.raises(Unauthenticated, match="not for this request"):
        ring.verify(other, ring.sign(GRANT))


def test_texts_cannot_trade_characters() -> None:
    assert replace(GRANT, request_id="r1p").message() != replace(GRANT, request_id="r1", source_instance="pp-0").message()


def test_every_flipped_bit_of_a_mac_is_refused() -> None:
    ring = Keyring([OLD])
    mac = ring.sign(GRANT)
    for bit in range(8 * len(mac)):
        forged = bytearray(mac)
        forged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Unauthenticated):
            ring.verify(GRANT, bytes(forged))
    for forged in (b"", mac[:-1], mac + b"\0"):
        with pytest.raises(Unauthenticated):
            ring.verify(GRANT, bytes(forged))


def test_two_keys_are_valid_and_the_first_one_signs() -> None:
    both = Keyring([NEW, OLD])
    both.verify(GRANT, Keyring([OLD]).sign(GRANT))
    Keyring([NEW]).verify(GRANT, both.sign(GRANT))
    with pytest.raises(Unauthenticated, match="key that is not valid"):
        Keyring([NEW]).verify(GRANT, Keyring([OLD]).sign(GRANT))


def test_a_rotated_file_signs_anew_and_still_takes_what_was_signed_before(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    make_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    reader = KeyFile(path)
    macs = [reader.keys.sign(GRANT)]
    for _ in range(2):
        rotate_key_file(path)
        macs.append(reader.keys.sign(GRANT))
        reader.keys.verify(GRANT, macs[-1])
        reader.keys.verify(GRANT, macs[-2])
    assert len(set(macs)) == 3
    with pytest.raises(Unauthenticated):
        reader.keys.verify(GRANT, macs[0])
    assert path.stat().st_mode & 0o777 == 0o600
    make_key_file(path)
    reader.keys.verify(GRANT, macs[-1])


@pytest.mark.parametrize("text", ["", "zz", "00", "\n".join(["00" * 32] * 9)])
def test_a_damaged_key_file_is_refused_and_a_running_reader_keeps_its_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    make_key_file(path)
    reader = KeyFile(path)
    mac = reader.keys.sign(GRANT)
    path.write_text(text)
    with pytest.raises(ConfigError, match="key"):
        read_key_file(path)
    reader.keys.verify(GRANT, mac)


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    make_key_file(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(path)

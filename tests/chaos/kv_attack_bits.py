"""One changed bit in any field of a message, found by the message's own descriptor: so new fields are attacked too."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

_BITS = {
    FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_UINT64: 64, FieldDescriptor.TYPE_INT32: 31,
    FieldDescriptor.TYPE_INT64: 63, FieldDescriptor.TYPE_FIXED32: 32, FieldDescriptor.TYPE_FIXED64: 64,
    FieldDescriptor.TYPE_BOOL: 1, FieldDescriptor.TYPE_ENUM: 3,
}  # fmt: skip
_EMPTY: dict[int, Any] = {FieldDescriptor.TYPE_BYTES: b"", FieldDescriptor.TYPE_STRING: "", FieldDescriptor.TYPE_DOUBLE: 0.0}


def paths(descriptor: Descriptor, whole: frozenset[str] = frozenset()) -> Iterator[str]:
    """The dotted names of all fields that hold a value, those of sub-messages included; `whole` are not looked into."""
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE and not is_list(field) and field.name not in whole:
            yield from (f"{field.name}.{path}" for path in paths(field.message_type))
        else:
            yield field.name


def flipped(message: Any, path: str, rng: random.Random) -> Any:
    """A copy with one bit of the field changed; an empty text or list gets something instead. Never equal to the original."""
    changed = copy_of(message)
    *outer, name = path.split(".")
    owner = changed
    for step in outer:
        owner = getattr(owner, step)
    _flip(owner, owner.DESCRIPTOR.fields_by_name[name], rng)
    return changed


def cleared(message: Any, path: str) -> Any:
    """A copy without the field."""
    changed = copy_of(message)
    *outer, name = path.split(".")
    owner = changed
    for step in outer:
        owner = getattr(owner, step)
    owner.ClearField(name)
    return changed


def copy_of(message: Any) -> Any:
    """A copy that shares nothing."""
    made = type(message)()
    made.CopyFrom(message)
    return made


def raw_flipped(raw: bytes, rng: random.Random) -> bytes:
    """The bytes with one bit changed."""
    return _flip_bytes(raw, rng)


def _flip(owner: Message, field: FieldDescriptor, rng: random.Random) -> None:
    value = getattr(owner, field.name)
    if is_list(field):
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            value.add()
        elif value:
            at = rng.randrange(len(value))
            value[at] = _changed(value[at], field, rng)
        else:
            value.append(_changed(_EMPTY.get(field.type, 0), field, rng))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        inner = rng.choice([one for one in field.message_type.fields if not is_list(one)])
        _flip(value, inner, rng)
    else:
        setattr(owner, field.name, _changed(value, field, rng))


def _changed(value: Any, field: FieldDescriptor, rng: random.Random) -> Any:
    match field.type:
        case FieldDescriptor.TYPE_BYTES:
            return _flip_bytes(value, rng) if value else b"\0"
        case FieldDescriptor.TYPE_STRING:
            return _flip_text(value, rng)
        case FieldDescriptor.TYPE_DOUBLE:
            bit = 1 << rng.randrange(52)  # of the fraction: NaN is not equal to itself
            return struct.unpack("<d", struct.pack("<Q", struct.unpack("<Q", struct.pack("<d", value))[0] ^ bit))[0]
        case FieldDescriptor.TYPE_BOOL:
            return not value
    return value ^ (1 << rng.randrange(_BITS[field.type]))


def _flip_bytes(value: bytes, rng: random.Random) -> bytes:
    bit = rng.randrange(8 * len(value))
    return value[: bit // 8] + bytes([value[bit // 8] ^ 1 << bit % 8]) + value[bit // 8 + 1 :]


def _flip_text(value: str, rng: random.Random) -> str:
    if not value:
        return "x"
    at = rng.randrange(len(value))
    return value[:at] + chr(ord(value[at]) ^ 1 << rng.randrange(7)) + value[at + 1 :]


def is_list(field: FieldDescriptor) -> bool:
    """True for a repeated field."""
    return bool(field.is_repeated)

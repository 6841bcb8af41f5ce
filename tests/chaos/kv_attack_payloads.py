"""Attacks on what is said of a payload and where it is: the head of a message decides into which memory its bytes go."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from protos.wire import kv
from tests.chaos.kv_attack_bits import copy_of
from tests.chaos.kv_attack_messages import Case, Change, Honest, Message, Others, Stage
from tests.support.push_frames import Part

PartChange = Callable[[random.Random, list[Part], Others], None]


def payload_cases() -> Iterator[Case]:
    """The cases, in the order of the table."""
    for name, change in (
        ("payload too long", _of_parts(_too_long)), ("payload too short", _of_parts(_too_short)),
        ("payload not last", _of_message(_not_last)), ("payload twice", _of_message(_twice)),
        ("payload of an end", _payload_of_end), ("blocks beside an end", _blocks_beside_end),
        ("sizes that trade bytes", _of_parts(_trade)), ("bytes beside a reference", _of_parts(_beside_reference)),
        ("carried beside named parts", _of_parts(_mixed)), ("named without a pool", _of_parts(_named)),
    ):  # fmt: skip
        yield Case(name, "payload", Stage.PUSH, change)


def _of_parts(change: PartChange) -> Change:
    """`change` works on the parts of one message of several."""

    def made(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
        per_message = rng.choice([2, 4])
        at = rng.randrange(0, len(me.parts) - 1, per_message)
        parts = list(me.parts[at : at + per_message])
        change(rng, parts, others)
        return list(me.messages(transfer_id, per_message, parts=[*me.parts[:at], *parts, *me.parts[at + per_message :]]))

    return made


def _of_message(change: Callable[[random.Random, bytes, bytes], bytes]) -> Change:
    """`change` makes one message of the bytes of its other fields, and of those of the field with the payload."""

    def made(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
        messages: list[Message] = list(me.messages(transfer_id, rng.choice([1, 2])))
        at = rng.randrange(len(messages) - 1)
        whole = messages[at]
        assert isinstance(whole, kv.PushFrame)
        head = copy_of(whole)
        head.ClearField("payload")
        payload = kv.PushFrame(payload=whole.payload)
        messages[at] = change(rng, head.SerializeToString(), payload.SerializeToString())
        return messages

    return made


def _too_long(rng: random.Random, parts: list[Part], others: Others) -> None:
    parts[-1] = parts[-1].beside(parts[-1].payload + rng.randbytes(rng.choice([1, 64, 5000])))


def _too_short(rng: random.Random, parts: list[Part], others: Others) -> None:
    at = rng.randrange(len(parts))
    parts[at] = parts[at].beside(parts[at].payload[: rng.randrange(len(parts[at].payload))])


def _trade(rng: random.Random, parts: list[Part], others: Others) -> None:
    """Some bytes of one part count as those of its neighbour; their sum is right."""
    at, count = rng.randrange(len(parts) - 1), rng.randrange(1, len(parts[0].payload))
    parts[at] = parts[at].saying(payload_bytes=len(parts[at].payload) - count)
    parts[at + 1] = parts[at + 1].saying(payload_bytes=len(parts[at + 1].payload) + count)


def _beside_reference(rng: random.Random, parts: list[Part], others: Others) -> None:
    at = rng.randrange(len(parts))
    parts[at] = parts[at].saying(pool_bytes=others.block_bytes, pool_offset=rng.choice([0, others.block_bytes, 2**63]))


def _name(rng: random.Random, part: Part, others: Others) -> Part:
    return part.with_bytes(b"", pool_bytes=others.block_bytes, pool_offset=rng.choice([0, others.block_bytes, 2**63]))


def _mixed(rng: random.Random, parts: list[Part], others: Others) -> None:
    at = rng.randrange(len(parts))
    parts[at] = _name(rng, parts[at], others)


def _named(rng: random.Random, parts: list[Part], others: Others) -> None:
    parts[:] = [_name(rng, part, others) for part in parts]


def _not_last(rng: random.Random, head: bytes, payload: bytes) -> bytes:
    behind = kv.PushFrame(stream=rng.choice([1, 2**32 - 1])) if rng.random() < 0.3 else kv.PushFrame(transfer_id="x")
    return rng.choice([payload + head, head + payload + behind.SerializeToString(), head + payload + b"\0"])


def _twice(rng: random.Random, head: bytes, payload: bytes) -> bytes:
    true = kv.PushFrame.FromString(payload).payload
    at = rng.randrange(len(true))
    first, second = (kv.PushFrame(payload=one).SerializeToString() for one in (true[:at], true[at:]))
    return head + rng.choice([payload + payload, first + second, b"\x42\x00" + payload])


def _payload_of_end(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    messages = me.messages(transfer_id)
    messages[-1].payload = rng.randbytes(rng.choice([1, 100]))
    return list(messages)


def _blocks_beside_end(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    """The last blocks come in the same message as the end, or none do."""
    messages = me.messages(transfer_id)
    messages[-2].end.CopyFrom(messages[-1].end)
    if rng.random() < 0.5:
        return list(messages[:-1])
    messages = me.messages(transfer_id)
    messages[-1].blocks.SetInParent()
    return list(messages)

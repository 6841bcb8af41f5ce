"""The catalogue of attacks on the KV plane: what a peer, or somebody on the way, makes of the messages of an honest hand-off.

A case changes true messages, so that everything but the one change is right, the capability included. Where a peer is to lie
rather than to err, digests are made anew over the lie.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from protos.contract.redis_names import pack_tokens
from protos.wire import common, fingerprint_key, kv
from tests.chaos.kv_attack_bits import cleared, copy_of, flipped, paths, raw_flipped
from tests.chaos.kv_attack_messages import Case, Change, Honest, Message, Others, Stage, changed, one_block_of, random_id
from tests.chaos.kv_attack_payloads import payload_cases
from tests.support.push_frames import Part, message_of, parts_of, with_part
from workers.kv_transfer.authority import grant_of
from workers.kv_transfer.digest import DigestScope

WHOLE = frozenset({"timeline"})
NOT_DECISIVE = frozenset({"deadline_s", "reason"})  # a request or a close with another one is as good


def catalogue() -> list[Case]:
    """Every case, in the order of the table."""
    return [*_unsound_metadata(), *_advisories(), *_bits(), *_out_of_place(), *payload_cases(), *_replies()]


# -- vllm#52234: hand-off metadata that is unknown, out of range, reused, stale, expired ------------------------------------


def _unsound_metadata() -> Iterator[Case]:
    issue = "vllm#52234"
    yield Case(
        "unknown request", issue, Stage.OPEN, lambda rng, me, others, _: changed(me.claim, request_id=f"x{random_id(rng)}")
    )
    yield Case("unknown transfer", issue, Stage.PUSH, lambda rng, me, others, _: me.messages(random_id(rng)))
    yield Case("out of range", issue, Stage.PUSH, _out_of_range)
    yield Case("reused", issue, Stage.REPLAY, lambda rng, me, others, _: me, may_pass=True)
    yield Case("stale open", issue, Stage.OPEN, lambda rng, me, others, _: others.earlier[-1].claim, second_epoch=True)
    yield Case("stale frames", issue, Stage.PUSH, lambda rng, me, others, _: _old(others.earlier[-1]), second_epoch=True)
    yield Case("stale blocks", issue, Stage.PUSH, _earlier_blocks, second_epoch=True)
    yield Case("expired", issue, Stage.OPEN, _expired)


def _out_of_range(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    blocks = len(me.parts)
    at = rng.randrange(blocks)
    field, values = rng.choice(
        [
            ("block_index", [me.claim.num_blocks, me.claim.num_blocks + rng.randrange(1, 99), 2**32 - 1, 2**31]),
            ("layer_group", [1, 2**16, 2**32 - 1]),
            ("offset_bytes", [1, others.block_bytes, 2**32 - 1]),
            ("next_token_ids", [259, 2**31, 2**32 - 1]),
            ("first_output_index", [1, 2**32 - 1]),
            ("num_tokens", [0, me.end.num_tokens - 1, me.end.num_tokens + 1, 2**32 - 1]),
        ]
    )  # fmt: skip
    value = rng.choice(values)
    if field in ("next_token_ids", "first_output_index", "num_tokens"):
        lie = changed(me.end, **{field: pack_tokens([value]) if field == "next_token_ids" else value})
        lie.digest = me.scope.of_end(lie)
        return list(me.messages(transfer_id, end=lie))
    part = me.parts[at].saying(**{field: value})
    part = part.saying(digest=me.scope.of(part.head.block_index, part.head.layer_group, part.payload))
    return list(me.messages(transfer_id, parts=[*me.parts[:at], part, *me.parts[at + 1 :]]))


def _old(earlier: Honest) -> list[Message]:
    return list(earlier.messages(earlier.transfer_id))


def _earlier_blocks(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    old = others.earlier[-1]
    return list(me.messages(transfer_id, parts=one_block_of(rng, me, old)))


def _expired(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
    claim = copy_of(me.claim)
    claim.capability.expires_at_ms -= rng.randrange(600_000, 10**9)
    claim.capability.mac = others.keys().sign(grant_of(claim, others.block_bytes))
    return claim


# -- the five advisories of 2026 on prefill/decode metadata -----------------------------------------------------------------


def _advisories() -> Iterator[Case]:
    required = [path for path in paths(kv.OpenRequest.DESCRIPTOR) if not _is_new("open", path)]
    needed = [path for path in required if path not in ("deadline_s", "fingerprint.template_digest", "capability.most_blocks")]
    yield Case(
        "missing key in Open", "CVE-2026-94622", Stage.OPEN, lambda rng, me, others, _: cleared(me.claim, rng.choice(needed))
    )
    yield Case("missing key in Push", "CVE-2026-94622", Stage.PUSH, _missing_key)
    yield Case("unbounded size in Open", "CVE-2026-94626", Stage.OPEN, _huge_open)
    yield Case("unbounded size in Push", "CVE-2026-94626", Stage.PUSH, _huge_push)
    yield Case("two prompts in Open", "CVE-2026-94623", Stage.OPEN, _two_prompts)
    yield Case("two requests in Push", "CVE-2026-94623", Stage.PUSH, _two_requests)
    yield Case("id of another request", "CVE-2026-94627", Stage.OPEN, _collision)
    yield Case("transfer of another request", "CVE-2026-94627", Stage.PUSH, _other_transfer)
    yield Case("sizes of the caller", "CVE-2026-105754", Stage.OPEN, _lying_sizes)
    yield Case("hashes of the caller", "CVE-2026-105754", Stage.OPEN, _lying_hashes)


def _missing_key(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    messages = me.messages(transfer_id)
    at = rng.randrange(len(messages))
    if rng.random() < 0.3:
        messages[at] = cleared(messages[at], rng.choice(["transfer_id", "epoch"]))
    elif at == len(messages) - 1:
        messages[at] = cleared(messages[at], rng.choice(["end", "end.num_tokens", "end.next_token_ids", "end.digest"]))
    else:
        # Block 0 at offset 0 of group 0 has no such fields on the wire.
        (part,) = parts_of(messages[at])
        match rng.randrange(5):
            case 0:
                messages[at] = cleared(messages[at], rng.choice(["blocks", "blocks.parts", "payload"]))
            case 1:
                messages[at] = cleared(cleared(messages[at], "blocks"), "payload")
            case 2:
                messages[at] = with_part(messages[at], 0, part.with_bytes(b""))
            case 3:
                messages[at] = with_part(messages[at], 0, part.saying(digest=b""))
            case _:
                messages[at] = with_part(messages[at], 0, part.saying(payload_bytes=0))
    return list(messages)


def _huge_open(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
    size = rng.choice([2**20, 2**31 - 1, 2**32 - 1])
    claim = rng.choice(
        [
            changed(me.claim, num_tokens=size, num_blocks=-(-size // 16)),
            changed(me.claim, block_hashes=b"\7" * rng.choice([2**16, 2**20, 4 * 2**20])),
            changed(me.claim, request_id="r" * rng.choice([65, 2**16])),
            changed(me.claim, num_blocks=size),
        ]
    )
    claim.capability.most_blocks = rng.choice([0, 2**32 - 1])
    claim.capability.mac = others.keys().sign(grant_of(claim, others.block_bytes))
    return claim


def _huge_push(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    kind = rng.randrange(6)
    if kind == 0:  # more bytes than a layer group has, and than there is credit for
        part = me.parts[0].with_bytes(b"\0" * rng.choice([others.block_bytes + 1, 100_000, 2**20]))
        return list(me.messages(transfer_id, parts=[part, *me.parts[1:]]))
    if kind == 1:  # more data frames than a message may have
        return [message_of(transfer_id, me.claim.epoch, [me.parts[0], *[me.parts[1]] * 500])]
    if kind == 2:  # a length that goes beyond the message, of the heads or of the payload
        raw = kv.PushFrame(transfer_id=transfer_id, epoch=me.claim.epoch).SerializeToString()
        return [raw + rng.choice([b"\x3a", b"\x42"]) + b"\xff" * rng.choice([4, 9]) + b"\x7f"]
    if kind == 5:  # more bytes than there are, or ever will be
        part = me.parts[0].saying(payload_bytes=rng.choice([2**20, 2**31, 2**32 - 1]))
        return list(me.messages(transfer_id, parts=[part, *me.parts[1:]]))
    end = changed(me.end, next_token_ids=pack_tokens([5] * 10_000)) if kind == 3 else copy_of(me.end)
    if kind == 4:
        end.next_logprobs.extend([b"\1"] * 10_000)
    end.digest = me.scope.of_end(end)
    return list(me.messages(transfer_id, end=end))


def _two_prompts(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
    other = rng.choice(others.same_tenant).claim
    claim: kv.OpenRequest = changed(
        me.claim, num_tokens=me.claim.num_tokens + other.num_tokens, num_blocks=me.claim.num_blocks + other.num_blocks,
        block_hashes=me.claim.block_hashes + other.block_hashes,
    )  # fmt: skip
    if rng.random() < 0.5:
        claim.capability.mac = others.keys().sign(grant_of(claim, others.block_bytes))
    return claim


def _two_requests(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    mine, theirs = me.messages(transfer_id), rng.choice(others.same_tenant)
    second = theirs.messages(rng.choice([transfer_id, theirs.transfer_id]))
    if rng.random() < 0.5:
        return [*mine[:-1], *second]
    at = rng.randrange(1, len(mine) - 1)
    return [*mine[:at], *second[:-1], *mine[at:]]


def _collision(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
    """The id of another request, with the capability of this one or with one that a true key made for that id."""
    claim = changed(me.claim, request_id=rng.choice([*others.same_tenant, *others.other_tenant]).claim.request_id)
    if rng.random() < 0.5:
        claim.capability.mac = others.keys().sign(grant_of(claim, others.block_bytes))
    return claim


def _other_transfer(rng: random.Random, me: Honest, others: Others, _: str) -> list[Message]:
    return list(me.messages(rng.choice([*others.same_tenant, *others.other_tenant]).transfer_id))


def _lying_sizes(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
    """Fewer or more blocks than the request has, consistent with each other and signed for with a true key."""
    claim, most = copy_of(me.claim), me.claim.num_blocks
    blocks = rng.choice([n for n in (1, most - 1, most + 1, 2 * most) if n != most])
    claim.num_blocks, claim.num_tokens = blocks, blocks * 16
    claim.block_hashes = (me.claim.block_hashes * 3)[: 16 * blocks]
    claim.capability.mac = others.keys().sign(grant_of(claim, others.block_bytes))
    return claim


def _lying_hashes(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
    known = rng.choice([*others.same_tenant, *others.other_tenant]).claim.block_hashes
    hashes = bytearray(me.claim.block_hashes)
    at = rng.randrange(0, len(hashes), 16)
    hashes[at : at + 16] = rng.choice([known[at : at + 16], bytes(16)])
    return changed(me.claim, block_hashes=bytes(hashes))


# -- one changed bit in each field ------------------------------------------------------------------------------------------


def _bits() -> Iterator[Case]:
    for path in paths(kv.OpenRequest.DESCRIPTOR):
        yield Case(f"Open.{path}", "one bit", Stage.OPEN, _flip_open(path), _is_open_ended("open", path))
    yield Case(
        "Open, anywhere", "one bit", Stage.OPEN,
        lambda rng, me, others, _: raw_flipped(me.claim.SerializeToString(), rng), may_pass=True,
    )  # fmt: skip
    for path in ("transfer_id", "epoch", "stream"):
        yield Case(f"Push.{path}", "one bit", Stage.PUSH, _flip_head(path))
    for path in ("payload", *paths(kv.BlockFrame.DESCRIPTOR)):
        may_pass = _is_open_ended("block", path)
        yield Case(f"Push.data.{path}", "one bit", Stage.PUSH, _flip_part(path, 1), may_pass)
        yield Case(f"Push.more.{path}", "one bit", Stage.PUSH, _flip_part(path, 2), may_pass)
    for path in paths(kv.EndFrame.DESCRIPTOR, WHOLE):
        yield Case(f"End.{path}", "one bit", Stage.PUSH, _flip_end(path))
    yield Case("Push, anywhere", "one bit", Stage.PUSH, _flip_anywhere, may_pass=True)
    for path in paths(kv.CloseRequest.DESCRIPTOR):
        yield Case(f"Close.{path}", "one bit", Stage.CLOSE, _flip_message(path), path == "reason")


def _flip_message(path: str) -> Change:
    return lambda rng, me, others, message: flipped(message, path, rng)


def _flip_open(path: str) -> Change:
    """With the capability as it was, or with one that a true key made for the changed claim."""

    def change(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
        claim: kv.OpenRequest = flipped(me.claim, path, rng)
        if not path.startswith("capability") and rng.random() < 0.5:
            claim.capability.mac = others.keys().sign(grant_of(claim, others.block_bytes))
        return claim

    return change


def _flip_head(path: str) -> Change:
    def change(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
        messages = me.messages(transfer_id, rng.choice([1, 2]))
        at = rng.randrange(len(messages))
        messages[at] = flipped(messages[at], path, rng)
        return list(messages)

    return change


def _flip_part(path: str, per_message: int) -> Change:
    def change(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
        at = rng.randrange(per_message - 1, len(me.parts), per_message)
        part = me.parts[at]
        if path == "payload":
            part = part.beside(raw_flipped(part.payload, rng))
        else:
            part = Part(flipped(part.head, path, rng), part.payload)
        return list(me.messages(transfer_id, per_message, parts=[*me.parts[:at], part, *me.parts[at + 1 :]]))

    return change


def _flip_end(path: str) -> Change:
    return lambda rng, me, others, transfer_id: list(me.messages(transfer_id, end=flipped(me.end, path, rng)))


def _flip_anywhere(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    messages: list[Message] = list(me.messages(transfer_id, rng.choice([1, 2, 4])))
    at = rng.randrange(len(messages))
    messages[at] = raw_flipped(messages[at].SerializeToString(), rng)  # type: ignore[union-attr]
    return messages


# -- blocks and frames out of place -----------------------------------------------------------------------------------------


def _out_of_place() -> Iterator[Case]:
    for name, change in (
        ("swapped blocks", _swapped), ("swapped messages", _swapped_messages), ("block twice", _twice),
        ("block missing", _missing), ("end missing", lambda rng, me, others, t: list(me.messages(t))[:-1]),
        ("end first", lambda rng, me, others, t: me.messages(t)[-1:] + me.messages(t)[:-1]),
        ("stream of nothing", lambda rng, me, others, t: []),
        ("foreign fingerprint", _other_fingerprint),
    ):  # fmt: skip
        yield Case(name, "out of place", Stage.PUSH, change)
    for name, known in (("foreign request", False), ("foreign tenant", True)):
        yield Case(f"{name}: block", "out of place", Stage.PUSH, _foreign_block(known))
        yield Case(f"{name}: end", "out of place", Stage.PUSH, _foreign_end(known))
        yield Case(f"{name}: capability", "out of place", Stage.OPEN, _foreign_capability(known))
    yield Case("end twice", "out of place", Stage.PUSH, lambda rng, me, o, t: [*me.messages(t), me.messages(t)[-1]], True)


def _swapped(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    """Two blocks trade payload and digest and keep their places."""
    one, two = rng.sample(range(len(me.parts)), 2)
    parts = list(me.parts)
    for at, source in ((one, me.parts[two]), (two, me.parts[one])):
        parts[at] = parts[at].with_bytes(source.payload, digest=source.head.digest)
    return list(me.messages(transfer_id, parts=parts))


def _swapped_messages(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    one, two = rng.sample(range(len(me.parts)), 2)
    parts = list(me.parts)
    parts[one], parts[two] = parts[two], parts[one]
    return list(me.messages(transfer_id, rng.choice([1, 2]), parts=parts))


def _twice(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    at = rng.randrange(len(me.parts))
    return list(me.messages(transfer_id, rng.choice([1, 2]), parts=[*me.parts[: at + 1], *me.parts[at:]]))


def _missing(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    at = rng.randrange(len(me.parts))
    return list(me.messages(transfer_id, rng.choice([1, 2]), parts=[*me.parts[:at], *me.parts[at + 1 :]]))


def _other_fingerprint(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
    """Digests as a worker of another model, dtype or template would make them."""
    path = rng.choice(list(paths(common.Fingerprint.DESCRIPTOR)))
    fingerprint = flipped(me.claim.fingerprint, path, rng)
    scope = DigestScope(fingerprint_key(fingerprint), me.claim.request_id, me.claim.epoch)
    parts = [
        part.saying(digest=scope.of(part.head.block_index, part.head.layer_group, part.payload)) for part in me.parts
    ]  # fmt: skip
    return list(me.messages(transfer_id, parts=parts))


def _foreign_block(other_tenant: bool) -> Change:
    def change(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
        source = rng.choice(others.other_tenant if other_tenant else others.same_tenant)
        return list(me.messages(transfer_id, parts=one_block_of(rng, me, source)))

    return change


def _foreign_end(other_tenant: bool) -> Change:
    def change(rng: random.Random, me: Honest, others: Others, transfer_id: str) -> list[Message]:
        return list(me.messages(transfer_id, end=rng.choice(others.other_tenant if other_tenant else others.same_tenant).end))

    return change


def _foreign_capability(other_tenant: bool) -> Change:
    def change(rng: random.Random, me: Honest, others: Others, _: str) -> kv.OpenRequest:
        source = rng.choice(others.other_tenant if other_tenant else others.same_tenant)
        return changed(me.claim, capability=source.claim.capability)

    return change


# -- what the receiver answers ----------------------------------------------------------------------------------------------


def _replies() -> Iterator[Case]:
    for path in paths(kv.OpenReply.DESCRIPTOR):
        yield Case(f"OpenReply.{path}", "one bit", Stage.OPEN_REPLY, _flip_message(path), may_pass=True)
    for path in paths(kv.PushReply.DESCRIPTOR):
        yield Case(f"PushReply.{path}", "one bit", Stage.PUSH_REPLY, _flip_message(path), may_pass=True)
    yield Case("reply to Open lost", "out of place", Stage.OPEN_REPLY, lambda rng, me, others, _: None, may_pass=True)
    yield Case("commit lost", "out of place", Stage.PUSH_REPLY, lambda rng, me, others, _: None, may_pass=True)


# -- pieces -----------------------------------------------------------------------------------------------------------------

_KNOWN_OPEN_FIELDS = range(1, 14)
_KNOWN_BLOCK_FIELDS = (1, 2, 3, 5, 9)


def _is_new(message: str, path: str) -> bool:
    """True for a field that came after this catalogue: nothing is known of what it decides."""
    if path == "payload":
        return False
    descriptor, known = (
        (kv.OpenRequest.DESCRIPTOR, _KNOWN_OPEN_FIELDS)
        if message == "open"
        else (kv.BlockFrame.DESCRIPTOR, _KNOWN_BLOCK_FIELDS)
    )
    return descriptor.fields_by_name[path.split(".", maxsplit=1)[0]].number not in known


def _is_open_ended(message: str, path: str) -> bool:
    return path in NOT_DECISIVE or _is_new(message, path)

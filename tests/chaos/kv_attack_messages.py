"""The messages of hand-offs as an attacker keeps and changes them, and what a case of the catalogue is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from protos.contract.capability import Keyring
from protos.wire import fingerprint_key, kv
from tests.chaos.kv_attack_bits import copy_of
from tests.support.push_frames import Part, message_of
from workers.kv_transfer.digest import DigestScope

Message = kv.PushFrame | bytes


class Stage(StrEnum):
    """Which message of the hand-off is attacked."""

    OPEN = "open"
    PUSH = "push"
    CLOSE = "close"
    REPLAY = "replay"  # everything again, after the request has ended
    OPEN_REPLY = "open reply"
    PUSH_REPLY = "push reply"


@dataclass(frozen=True, slots=True)
class Honest:
    """What an honest sender said in one hand-off, and the receiver's name for it."""

    claim: kv.OpenRequest
    transfer_id: str = ""
    parts: tuple[Part, ...] = ()
    end: kv.EndFrame = field(default_factory=kv.EndFrame)

    @property
    def scope(self) -> DigestScope:
        """What its digests are bound to."""
        return DigestScope(fingerprint_key(self.claim.fingerprint), self.claim.request_id, self.claim.epoch)

    def messages(
        self,
        transfer_id: str,
        per_message: int = 1,
        parts: Sequence[Part] | None = None,
        end: kv.EndFrame | None = None,
    ) -> list[kv.PushFrame]:
        """The stream, `per_message` data frames in a message; `parts` and `end` take the place of the true ones."""
        epoch, chosen = self.claim.epoch, self.parts if parts is None else parts
        made = [
            message_of(transfer_id, epoch, chosen[at : at + per_message]) for at in range(0, len(chosen), per_message)
        ]  # fmt: skip
        return [*made, kv.PushFrame(transfer_id=transfer_id, epoch=epoch, end=self.end if end is None else end)]


@dataclass(frozen=True, slots=True)
class Others:
    """What the attacker has seen besides: hand-offs of other requests, and those of this one at earlier epochs."""

    same_tenant: Sequence[Honest]
    other_tenant: Sequence[Honest]
    earlier: Sequence[Honest]
    keys: Callable[[], Keyring]
    block_bytes: int


Change = Callable[[random.Random, Honest, Others, str], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One attack. `change` gives what is sent instead: the claim (Stage.OPEN), the stream (PUSH), the message (the others).

    `may_pass`: the receiver need not refuse it, since no token depends on it; the tokens must be right all the same.
    `second_epoch`: the request must have been placed twice.
    """

    name: str
    source: str
    stage: Stage
    change: Change
    may_pass: bool = False
    second_epoch: bool = False


def one_block_of(rng: random.Random, me: Honest, source: Honest) -> list[Part]:
    """The blocks of the request, but for one that comes from elsewhere with its own digest, in the right place."""
    at = rng.randrange(len(me.parts))
    mine, theirs = me.parts[at], source.parts[at % len(source.parts)]
    return [*me.parts[:at], mine.with_bytes(theirs.payload, digest=theirs.head.digest), *me.parts[at + 1 :]]


def changed(message: Any, **changes: Any) -> Any:
    """A copy with other values in some fields."""
    made = copy_of(message)
    for name, value in changes.items():
        if isinstance(value, kv.Capability):
            getattr(made, name).CopyFrom(value)
        else:
            setattr(made, name, value)
    return made


def random_id(rng: random.Random) -> str:
    """As the receiver makes them."""
    return f"{rng.getrandbits(128):032x}"

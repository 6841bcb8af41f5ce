"""An attacker between two workers: keeps what an honest hand-off says, sends changed copies of it, then lets it through.

Every change must differ from the truth, or NoEffect is raised: an attack that changes nothing would pass for a defence.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from protos.contract.capability import Keyring
from protos.contract.errors import AutanError, BadFrame
from protos.rpc import error_of
from protos.wire import error_to_wire, kv
from tests.chaos.kv_attack_messages import Case, Honest, Message, Others, Stage
from tests.support.kv_wire import FaultyWire
from tests.support.push_frames import Part, flip, message_of, part, parts_of

KEPT = 64  # hand-offs of each tenant that the attacker remembers
DRAWS = 50
PATIENCE_S = 10.0
COMMIT = "commit"


class NoEffect(AssertionError):
    """A case changed nothing: it is aimed at something that is not there."""


@dataclass(slots=True)
class Attack:
    """What is done to one request. `tries` are made in its first hand-off, or in its second one."""

    case: Case
    tenant: str
    tries: int
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    passed: list[str] = field(default_factory=list)  # what had to be refused and was not
    earlier: list[Honest] = field(default_factory=list)
    now: Honest | None = None
    done: int = 0
    is_over: bool = False

    def note(self, outcome: str) -> None:
        """One try took effect and came to this."""
        self.done += 1
        self.outcomes[outcome] += 1

    def is_next(self, epoch: int) -> bool:
        """True when the attack happens in the hand-off of this epoch. One that is only tried again is no second one."""
        return not self.is_over and any(one.claim.epoch < epoch for one in self.earlier) == self.case.second_epoch


class AttackWire(FaultyWire):
    """`attacks` by request id. Everything else goes through as it is."""

    def __init__(self, target: str, keys: Callable[[], Keyring], block_bytes: int) -> None:
        super().__init__(target)
        self.attacks: dict[str, Attack] = {}
        self.broken: list[BaseException] = []  # mistakes of the attacker: the run is worth nothing then
        self._keys = keys
        self._block_bytes = block_bytes
        self._seen: dict[str, deque[Honest]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._by_transfer: dict[str, Attack] = {}
        self._raw_open = self._channel.unary_unary(
            "/autan.v1.KvTransfer/Open",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=kv.OpenReply.FromString,
        )

    # -- the three calls ------------------------------------------------------------------------------------------------

    async def Open(self, request: kv.OpenRequest, context: Any) -> kv.OpenReply:
        attack = self.attacks.get(request.request_id)
        is_next = attack is not None and attack.is_next(request.epoch)
        if attack is None or not (is_next or attack.case.second_epoch):
            return await super().Open(request, context)
        if is_next and attack.case.stage is Stage.OPEN:
            refusal = await self._attack_open(attack, request)
            if refusal is not None:
                raise refusal
        reply: kv.OpenReply = await super().Open(request, context)
        attack.now = Honest(request, reply.transfer_id)
        is_next = attack.is_next(request.epoch)
        if is_next and attack.case.stage is Stage.CLOSE:
            await self._attack_close(attack, request, reply)
        if is_next and attack.case.stage is Stage.OPEN_REPLY:
            attack.is_over = True
            reply = self._changed(attack, reply)
            attack.note("told the sender" if reply is not None else "not told")
            if reply is None:
                await self._cut(context)
        if not attack.is_over:
            self._by_transfer[reply.transfer_id] = attack
        return reply

    async def Push(self, request_iterator: AsyncIterator[kv.PushFrame], context: Any) -> AsyncIterator[kv.PushReply]:
        frames = aiter(request_iterator)
        first = await anext(frames, None)
        attack = self._by_transfer.pop(first.transfer_id, None) if first is not None else None
        everything = _again(first, frames)
        if attack is None:
            replies = super().Push(everything, context)
        elif attack.case.stage is Stage.PUSH_REPLY:
            replies = self._attack_replies(attack, everything, context)
        else:
            replies = self._attack_push(attack, everything)
        async for reply in replies:
            yield reply

    # -- attacks --------------------------------------------------------------------------------------------------------

    async def replay(self, attack: Attack) -> None:
        """Sends a whole hand-off again, after its request has ended."""
        honest = attack.now
        assert honest is not None and honest.parts, "nothing was kept of it"
        for _ in range(attack.tries):
            try:
                reply = await self._open(honest.claim)
            except AutanError as error:
                attack.note(f"{error.reason} at Open")
                continue
            if reply.transfer_id != honest.transfer_id:
                attack.passed.append(f"{honest.claim.request_id}: a hand-off that was used up was opened again")
            messages = honest.messages(reply.transfer_id)
            outcome, _ = await self._stream(messages if attack.rng.random() < 0.5 else messages[-1:])
            attack.note("same commit again" if outcome == COMMIT else outcome)
        attack.is_over = True

    async def _attack_open(self, attack: Attack, request: kv.OpenRequest) -> AutanError | None:
        """The refusal of the last try when the sender is to hear of it; None when the true claim goes on."""
        attack.now = Honest(request)
        attack.is_over = True
        told = attack.rng.random() < 0.5
        for left in reversed(range(attack.tries)):
            claim = self._changed(attack, request)
            try:
                reply = await self._open(claim)
            except AutanError as error:
                attack.note(error.reason)
                if told and not left:
                    return error
                continue
            attack.note("opened")
            self._judge_passed(attack, f"opened {reply.transfer_id}")
        return None

    async def _attack_close(self, attack: Attack, request: kv.OpenRequest, reply: kv.OpenReply) -> None:
        true = kv.CloseRequest(
            transfer_id=reply.transfer_id, request_id=request.request_id, epoch=request.epoch, reason="overtaken"
        )
        attack.is_over = True
        for _ in range(1 if attack.case.may_pass else attack.tries):
            await self._stub.Close(self._changed(attack, true), timeout=PATIENCE_S)
            try:
                still_open = (await self._open(request)).transfer_id == reply.transfer_id
            except AutanError:
                still_open = False
            attack.note("ignored" if still_open else "closed")
            if not still_open:
                self._judge_passed(attack, "closed")

    async def _attack_replies(
        self, attack: Attack, frames: AsyncIterator[kv.PushFrame], context: Any
    ) -> AsyncIterator[kv.PushReply]:
        """Changes the first reply that has the field: a grant, the commit, or a refusal that a changed frame brings about."""
        path = attack.case.name.rsplit("PushReply.", maxsplit=1)[-1]
        kind = "refused" if path.startswith("refused") else "credit" if path.startswith("credit") else "commit"
        if kind == "refused":
            frames = _spoiled(frames)
        async for reply in super().Push(frames, context):
            has_it = bool(reply.credit_bytes) if kind == "credit" else reply.WhichOneof("outcome") == kind
            if attack.is_over or not has_it:
                yield reply
                continue
            attack.is_over = True
            changed = self._changed(attack, reply)
            attack.note("told the sender" if changed is not None else "not told")
            if changed is None:
                await self._cut(context)
            yield changed

    async def _attack_push(self, attack: Attack, frames: AsyncIterator[kv.PushFrame]) -> AsyncIterator[kv.PushReply]:
        honest = await self._kept(attack, frames)
        if honest is None:
            return
        if not attack.is_next(honest.claim.epoch):  # the first of two hand-offs: the sender is told that it failed
            attack.earlier.append(honest)
            yield kv.PushReply(refused=error_to_wire(BadFrame("the attacker keeps this one")))
            return
        if attack.case.stage is Stage.PUSH:
            reply = await self._tries(attack, honest)
            if reply is not None:
                yield reply
                return
        attack.is_over = attack.case.stage is not Stage.REPLAY
        _, reply = await self._once(honest, lambda transfer_id: list(honest.messages(transfer_id)))
        if reply is not None:
            yield reply

    async def _tries(self, attack: Attack, honest: Honest) -> kv.PushReply | None:
        """What the sender is told: the last refusal, or a commit; None when its own messages are to follow."""
        attack.is_over = True
        told = attack.rng.random() < 0.5
        for left in reversed(range(attack.tries)):
            outcome, reply = await self._once(honest, lambda transfer_id: self._changed_stream(attack, honest, transfer_id))
            if outcome.startswith("not opened"):
                return kv.PushReply(refused=error_to_wire(BadFrame(outcome)))  # the request goes another way meanwhile
            attack.note(outcome)
            if outcome == COMMIT:
                self._judge_passed(attack, COMMIT)
                return reply
            if told and not left and reply is not None:
                return reply
        return None

    async def _once(
        self, honest: Honest, made: Callable[[str], Sequence[Message]]
    ) -> tuple[str, kv.PushReply | None]:  # fmt: skip
        """Opens with the true claim, sends one stream and leaves nothing open but what is committed."""
        try:
            opened = await self._open(honest.claim)
        except AutanError as error:
            return f"not opened: {error.reason}", None
        outcome, reply = await self._stream(made(opened.transfer_id))
        if outcome != COMMIT:
            out_of_range = part(block_index=2**32 - 1)
            await self._stream([message_of(opened.transfer_id, honest.claim.epoch, [out_of_range])])
        return outcome, reply

    def _judge_passed(self, attack: Attack, what: str) -> None:
        if not attack.case.may_pass:
            attack.passed.append(f"{attack.now.claim.request_id if attack.now else ''}: {what}")

    # -- messages -------------------------------------------------------------------------------------------------------

    async def _kept(self, attack: Attack, frames: AsyncIterator[kv.PushFrame]) -> Honest | None:
        """Everything up to the end frame; None when the sender stops before it."""
        assert attack.now is not None
        parts: list[Part] = []
        async for frame in frames:
            if frame.HasField("blocks"):
                parts += parts_of(frame)
            elif frame.HasField("end"):
                honest = Honest(attack.now.claim, frame.transfer_id, tuple(parts), frame.end)
                if len(parts) < 2 or not all(one.payload for one in parts):
                    self.broken.append(NoEffect(f"{honest.claim.request_id}: {len(parts)} data frames, some without payload"))
                attack.now = honest
                self._seen[attack.tenant].append(honest)
                return honest
        return None

    def _others(self, attack: Attack) -> Others:
        mine = attack.now.claim.request_id if attack.now else ""
        same = [one for one in self._seen[attack.tenant] if one.claim.request_id != mine]
        other = [one for tenant, kept in self._seen.items() if tenant != attack.tenant for one in kept]
        return Others(same, other, attack.earlier, self._keys, self._block_bytes)

    def _changed(self, attack: Attack, true: Any) -> Any:
        """What goes out in the place of one message."""
        assert attack.now is not None
        for _ in range(DRAWS):
            made = attack.case.change(attack.rng, attack.now, self._others(attack), true)
            if made is None or _bytes(made) != _bytes(true):
                return made
        raise self._fail(NoEffect(f"{attack.case.name}: the message is as it was"))

    def _changed_stream(self, attack: Attack, honest: Honest, transfer_id: str) -> list[Message]:
        for _ in range(DRAWS):
            made = list(attack.case.change(attack.rng, honest, self._others(attack), transfer_id))
            sizes = {len(m.blocks.parts) for m in made[:-1] if isinstance(m, kv.PushFrame) and m.blocks.parts}
            same = [list(map(_bytes, honest.messages(transfer_id, size))) for size in {1, 2, 4, *sizes}]
            if list(map(_bytes, made)) not in same:
                return made
        raise self._fail(NoEffect(f"{attack.case.name}: the stream is as it was"))

    def _fail(self, error: BaseException) -> BaseException:
        self.broken.append(error)
        return error

    async def _open(self, claim: kv.OpenRequest | bytes) -> kv.OpenReply:
        try:
            reply: kv.OpenReply = await self._raw_open(claim, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return reply

    async def _stream(self, messages: Sequence[Message]) -> tuple[str, kv.PushReply | None]:
        """The outcome as a word, and the reply that had it."""
        call = self._push(timeout=PATIENCE_S)
        feeding = asyncio.create_task(_feed(call, messages))
        try:
            async for reply in call:
                if reply.WhichOneof("outcome") == COMMIT:
                    return COMMIT, reply
                if reply.WhichOneof("outcome"):
                    return reply.refused.reason, reply
        except grpc.aio.AioRpcError as error:
            found = error_of(error)
            return found.reason, kv.PushReply(refused=error_to_wire(found))
        finally:
            call.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
        return "no outcome", None


async def _feed(call: Any, messages: Sequence[Message]) -> None:
    for message in messages:
        await call.write(message)
    await call.done_writing()


async def _again(first: kv.PushFrame | None, frames: AsyncIterator[kv.PushFrame]) -> AsyncIterator[kv.PushFrame]:
    if first is not None:
        yield first
        async for frame in frames:
            yield frame


async def _spoiled(frames: AsyncIterator[kv.PushFrame]) -> AsyncIterator[kv.PushFrame]:
    """The payload of the first data frame is not what was digested."""
    done = False
    async for frame in frames:
        is_first = frame.HasField("blocks") and not done
        done |= is_first
        yield flip(frame) if is_first else frame


def _bytes(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString(deterministic=True)

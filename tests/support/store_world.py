"""Short words for the functions of the library, and hooks that make time pass at once. For tests of the functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protos.contract.redis_names import Fn, pack_tokens
from tests.support.store import RawStore

LONG_MS = 60_000
NEVER_LOST_MS = 10_000_000
INGRESS = "g0"
LEADER = "core0"


@dataclass(frozen=True)
class Entry:
    """One entry of an inbox, as pick tells it."""

    seq: int
    kind: str
    id: str
    epoch: int
    spec: Any
    journal: bytes
    peer_inst: str
    peer_addr: str
    peer_inc: str
    ingress_id: str
    ingress_addr: str
    ingress_epoch: str
    submitted_ms: str
    attempts: str
    capability: str | bytes
    source_inst: str = ""
    source_inc: str = ""
    source_blocks: str = ""
    source_wait_ms: str = ""


NO_SOURCE = ("", 0, 0, 0, b"")  # of a prefix, as assign takes it


class World:
    """One cluster: an ingress `g0` and a leader `core0` are there from the start."""

    def __init__(self, raw: RawStore) -> None:
        self.raw = raw
        self.redis = raw.redis
        self.base = raw.base
        self.ingress_epoch = int(self.call(Fn.INGRESS, INGRESS, "addr:g0", LONG_MS, 0)[1])
        self.leader_epoch = int(self.call(Fn.LEAD, LEADER, LONG_MS, 0)[1])

    def call(self, function: Fn, *arguments: str | bytes | int) -> list[Any]:
        """The plain reply of one function."""
        return self.raw.call(function, *arguments)

    # ingress

    def submit(self, id: str, **changes: Any) -> list[Any]:
        """Submits with defaults; the spec is `spec-<id>`."""
        values: dict[str, Any] = {
            "body": "body", "spec": f"spec-{id}", "tenant": "acme", "model": "m", "prompt": 10, "max": 8, "prio": 0,
            "timeout_ms": LONG_MS, "ingress": INGRESS, "ingress_epoch": self.ingress_epoch, "limit": 100,
        }  # fmt: skip
        assert not set(changes) - set(values), changes
        v = values | changes
        return self.call(
            Fn.SUBMIT, id, v["body"], v["spec"], v["tenant"], v["model"], v["prompt"], v["max"], v["prio"],
            v["timeout_ms"], v["ingress"], v["ingress_epoch"], f"addr:{v['ingress']}", v["limit"],
        )  # fmt: skip

    def emit(self, id: str, epoch: int, first: int, *tokens: int, ingress: str = INGRESS, at: int | None = None) -> list[Any]:
        """Emits for one request; (code, next index)."""
        at = self.ingress_epoch if at is None else at
        return self.call(Fn.EMIT, ingress, at, 1, id, epoch, first, pack_tokens(tokens))[1:]

    def finish(self, id: str, epoch: int, n: int, reason: str = "stop", ingress: str = INGRESS) -> list[Any]:
        """Finishes as the ingress of this world."""
        return self.call(Fn.FINISH, ingress, self.ingress_epoch, id, epoch, reason, n, LONG_MS)

    def cancel(self, id: str, tenant: str = "") -> list[Any]:
        """Cancels as an operator."""
        return self.call(Fn.CANCEL, id, tenant, "operator", LONG_MS)

    def resume(
        self, id: str, *, take: bool = False, ingress: str = INGRESS, at: int | None = None, start: int = 0
    ) -> list[Any]:
        """Resumes for any tenant."""
        at = self.ingress_epoch if at is None else at
        return self.call(Fn.RESUME, id, "", ingress, at, f"addr:{ingress}", start, int(take))

    def look(self, id: str) -> list[Any]:
        """(state, epoch, n, reason, error)."""
        return self.call(Fn.LOOK, 1, id)[1:]

    def state(self, id: str) -> str:
        """The state of one request; empty when it is not there."""
        return str(self.look(id)[0])

    # core

    def assign(self, id: str, p: str, d: str, *, epoch: int = 0, p_inc: int = 1, d_inc: int = 1, lease_ms: int = LONG_MS,
               blocks: tuple[int, int] = (2, 3), capability: bytes = b"",
               source: tuple[str | int | bytes, ...] = NO_SOURCE) -> list[Any]:  # fmt: skip
        """Assigns one request; (code, epoch)."""
        return self.call(
            Fn.ASSIGN, LEADER, self.leader_epoch, lease_ms, 1, id, epoch, p, p_inc, d, d_inc, *blocks, capability,
            *source,
        )[1:]  # fmt: skip

    def reap(
        self, *, limit: int = 100, max_attempts: int = 3, lost_ms: int = NEVER_LOST_MS
    ) -> tuple[dict[str, str], list[str]]:
        """Reaps; (outcomes by id, lost instances)."""
        reply = self.call(Fn.REAP, LEADER, self.leader_epoch, limit, max_attempts, lost_ms, LONG_MS)
        assert reply[0] == "OK", reply
        count = reply[2]
        flat = reply[3 : 3 + 2 * count]
        rest = reply[3 + 2 * count :]
        assert rest[0] == len(rest) - 1
        return dict(zip(flat[::2], flat[1::2], strict=True)), rest[1:]

    def view(self) -> dict[str, Any]:
        """The queue as a list of ids, and the load of each instance by name."""
        reply = self.call(Fn.VIEW, 1000)
        queued, at = reply[3], 4
        ids = [reply[at + 11 * i] for i in range(queued)]
        at += 11 * queued
        instances = {}
        for i in range(reply[at]):
            fields = reply[at + 1 + 16 * i : at + 17 + 16 * i]
            instances[fields[0]] = dict(zip(("p_requests", "p_tokens", "p_blocks", "d_requests", "d_blocks"),
                                            map(int, fields[7:12]), strict=True), state=fields[4])  # fmt: skip
        return {"queue": ids, "instances": instances, "total": reply[2]}

    # workers

    def instance(self, name: str, role: str = "combined") -> int:
        """Registers and becomes READY; the incarnation."""
        incarnation = int(self.call(Fn.REGISTER, name, role, f"addr:{name}", f"card-{name}")[1])
        assert self.renew(name, incarnation)[0] == "OK"
        return incarnation

    def renew(self, name: str, incarnation: int = 1, *items: tuple[str, int, str], state: str = "READY",
              lease_ms: int = LONG_MS) -> list[Any]:  # fmt: skip
        """Renews (id, epoch, what) items."""
        flat: list[str | bytes | int] = [value for item in items for value in item]
        return self.call(Fn.RENEW, name, incarnation, state, "stats", lease_ms, len(items), *flat)

    def pick(self, name: str, incarnation: int = 1, *, ack: int = 0, max_n: int = 64, lease_ms: int = LONG_MS) -> list[Entry]:
        """The entries of an inbox."""
        reply = self.call(Fn.PICK, name, incarnation, ack, max_n, lease_ms)
        assert reply[0] == "OK", reply
        entries = [reply[3 + 19 * i : 22 + 19 * i] for i in range(reply[2])]
        assert len(reply) == 3 + 19 * reply[2]
        return [Entry(int(e[0]), e[1], e[2], int(e[3]), *e[4:]) for e in entries]

    def told(self, name: str, incarnation: int = 1) -> list[tuple[str, str, int]]:
        """What a pick of everything tells: (kind, id, epoch)."""
        return [(entry.kind, entry.id, entry.epoch) for entry in self.pick(name, incarnation)]

    def read(self, name: str, incarnation: int = 1) -> list[tuple[str, str, int]]:
        """As told, and acknowledges it: the next pick tells only what is newer."""
        entries = self.pick(name, incarnation)
        if entries:
            self.pick(name, incarnation, ack=entries[-1].seq)
        return [(entry.kind, entry.id, entry.epoch) for entry in entries]

    def handoff(self, id: str, epoch: int, d: str, d_inc: int = 1) -> list[Any]:
        """Hands over to D."""
        return self.call(Fn.HANDOFF, id, epoch, d, d_inc, LONG_MS)

    def fail(self, id: str, epoch: int, name: str, incarnation: int = 1, *, retryable: bool = True, poison: bool = False,
             max_attempts: int = 3) -> list[Any]:  # fmt: skip
        """Fails as an instance, with the stored error `oops`."""
        return self.call(Fn.FAIL, id, epoch, name, incarnation, int(retryable), int(poison), max_attempts, LONG_MS, "oops")

    # paths through the life of a request

    def queued(self, id: str = "r", **changes: Any) -> str:
        """A fresh request; the state it is in."""
        assert self.submit(id, **changes)[0] == "OK"
        return self.state(id)

    def assigned(self, id: str = "r", p: str = "p", d: str = "d", **changes: Any) -> str:
        """A fresh request, assigned."""
        self.queued(id, **changes)
        assert self.assign(id, p, d) == ["OK", "1"]
        return self.state(id)

    def prefilling(self, id: str = "r", p: str = "p", d: str = "d", **changes: Any) -> str:
        """A fresh request, picked by P."""
        self.assigned(id, p, d, **changes)
        assert ("prefill", id, 1) in self.read(p)
        return self.state(id)

    def decoding(self, id: str = "r", p: str = "p", d: str = "d", **changes: Any) -> str:
        """A fresh request with one token, handed over to D."""
        self.prefilling(id, p, d, **changes)
        self.read(d)
        assert self.emit(id, 1, 0, 7) == ["OK", 1]
        assert self.handoff(id, 1, d)[0] == "OK"
        return self.state(id)

    # hooks: time has passed

    def lapse(self, id: str) -> None:
        """The lease of the request has ended."""
        self.redis.zadd(f"{self.base}:lease", {id: 1}, xx=True)

    def expire(self, id: str) -> None:
        """The deadline of the request has passed."""
        self.redis.zadd(f"{self.base}:deadline", {id: 1}, xx=True)

    def silence(self, name: str) -> None:
        """The instance beat last in 1970."""
        self.redis.hset(f"{self.base}:i:{name}", "beat_ms", 0)

    def forget_ingress(self, name: str = INGRESS) -> None:
        """The registration of the ingress has run out."""
        self.redis.hset(f"{self.base}:g:{name}", "expires_ms", 0)

"""A reference model of the store: what every request and instance must look like, kept by the rules of a state machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protos.contract.redis_names import pack_tokens
from tests.support.store import RawStore, new_cluster
from tests.support.store_invariants import LIVE, check_store
from tests.support.store_world import World

IDS = ("r0", "r1", "r2", "r3", "r4")
NAMES = ("a", "b", "c")
MAX_ATTEMPTS = 3


@dataclass
class Request:
    """What the model knows of one request."""

    state: str = "QUEUED"
    epoch: int = 0
    journal: list[int] = field(default_factory=list)
    known: int = 0  # tokens in the journal when it was assigned last
    attempts: int = 0
    p: tuple[str, int] | None = None
    d: tuple[str, int] | None = None
    holder: tuple[str, int] | None = None
    owner: int = 1  # epoch of the ingress
    has_p_role: bool = False


@dataclass
class Instance:
    """What the model knows of one instance."""

    incarnation: int = 0
    state: str = "STOPPED"
    want_drain: bool = False

    @property
    def alive(self) -> bool:
        """True until LOST or STOPPED."""
        return self.state in {"STARTING", "READY", "DRAINING"}


class ModelledStore(RuleBasedStateMachine):
    """A server, the model beside it, and what must hold of the two after every step."""

    url = ""

    @initialize()
    def open(self) -> None:
        self.raw = RawStore(self.url, new_cluster())
        self.world = World(self.raw)
        self.requests: dict[str, Request] = {}
        self.instances = {name: Instance() for name in NAMES}
        self.ingress_epoch = 1
        self.leader_epoch = 1
        self.ended: set[tuple[str, int]] = set()  # incarnations whose work the next reap requeues
        for name in NAMES:
            i = self.instances[name]
            i.incarnation, i.state = self.world.instance(name), "READY"

    def teardown(self) -> None:
        if hasattr(self, "raw"):
            self.raw.redis.flushdb()
            self.raw.close()

    # the model's own moves

    def _end(self, r: Request, state: str) -> None:
        r.state, r.holder, r.has_p_role = state, None, False

    def _give_up(self, r: Request, *, counts: bool, last: str = "DEAD") -> None:
        r.attempts += counts
        if counts and r.attempts >= MAX_ATTEMPTS:
            self._end(r, last)
        else:
            r.state, r.holder, r.p, r.d, r.has_p_role = "QUEUED", None, None, None, False

    def _end_incarnation(self, name: str, state: str) -> None:
        i = self.instances[name]
        i.state = state
        self.ended.add((name, i.incarnation))

    # what holds after every step

    @invariant()
    def keys_are_whole_and_as_modelled(self) -> None:
        if not hasattr(self, "raw"):
            return
        stored = check_store(self.raw)
        journals = stored.family("t")
        requests = stored.family("r")
        assert requests.keys() == self.requests.keys()
        for id, r in self.requests.items():
            found = requests[id]
            assert (found["state"], int(found["epoch"]), int(found["attempts"])) == (r.state, r.epoch, r.attempts), id
            assert journals.get(id, b"") == pack_tokens(r.journal)
            assert (found.get("holder") or None) == (r.holder[0] if r.holder else None)
        for name, i in self.instances.items():
            found = stored.family("i")[name]
            assert (found["state"], int(found["incarnation"])) == (i.state, i.incarnation)

    @precondition(lambda self: self.requests and not any(r.state in LIVE for r in self.requests.values()))
    @rule()
    def all_ended(self) -> None:
        stored = check_store(self.raw)
        for i in stored.family("i").values():
            assert {i.get(name, "0") for name in ("p_requests", "p_tokens", "p_blocks", "d_requests", "d_blocks")} == {"0"}
        assert not stored.family("parts") and not stored.family("own")

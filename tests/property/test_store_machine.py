"""Random calls of right and stale actors against a real server, compared with a reference model in Python.

The model decides what every call must answer; after each step the invariants of the keys are checked and the model's picture
of each request is compared with the store's. Time passes by hooks, never by waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from protos.contract.redis_names import Fn, pack_tokens
from tests.support.store import start_server
from tests.support.store_invariants import HELD, LIVE, PLACED
from tests.support.store_machine import IDS, MAX_ATTEMPTS, NAMES, ModelledStore, Request
from tests.support.store_world import INGRESS, LEADER, LONG_MS

ids = st.sampled_from(IDS)
names = st.sampled_from(NAMES)
troubles = st.sampled_from(("register", "deregister", "stale", "drain", "undrain", "DRAINING", "STARTING", "READY"))
rarely = st.sampled_from((0, 0, 0, 1))
drift = st.sampled_from((0,) * 12 + (-1, 1))  # of an epoch or incarnation: mostly right, sometimes stale or invented


class StoreMachine(ModelledStore):
    """Ingress, core and workers, each sometimes acting on what was true once."""

    # steps of a life without trouble, several times over: random calls alone hardly ever come far

    @rule(ids=st.lists(ids, min_size=1, max_size=8), p=names, d=names)
    def advance(self, ids: list[str], p: str, d: str) -> None:
        for id in ids:
            self._advance(id, p, d)

    @rule(id=ids, p=names, d=names, steps=st.integers(1, 5))
    def advance_one(self, id: str, p: str, d: str, steps: int) -> None:
        for _ in range(steps):
            self._advance(id, p, d)

    def _advance(self, id: str, p: str, d: str) -> None:
        r = self.requests.get(id)
        if r is None:
            self.submit(id)
        elif r.state == "QUEUED":
            for name in {p, d}:
                self._revive(name)
            self.assign(id, p, d, 0, 0)
        elif r.state == "ASSIGNED" and r.p is not None:
            self.pick(r.p[0], 0, ack=True)
        elif r.state == "PREFILLING" and r.d is not None and r.journal:
            self.handoff(id, r.d[0], 0, 0, right=True)
        elif r.state in HELD:
            self.emit(id, drift=0, owner=r.owner - self.ingress_epoch, back=0, count=1, flip=0)

    def _revive(self, name: str) -> None:
        i = self.instances[name]
        if not i.alive:
            self.register(name)
        if i.want_drain:
            self.drain(name, drain=False)
        if i.state != "READY":
            self.renew_state(name, "READY")

    # ingress

    @rule(id=ids)
    def submit(self, id: str) -> None:
        known = self.requests.get(id)
        reply = self.world.submit(id, ingress_epoch=self.ingress_epoch)
        if known is None:
            self.requests[id] = Request(owner=self.ingress_epoch)
            assert reply[:4] == ["OK", "QUEUED", "0", 0]
        else:
            assert reply[:4] == ["DUPLICATE", known.state, str(known.epoch), len(known.journal)]

    @rule(id=ids, really=st.sampled_from((True, False, False)))
    def cancel_sometimes(self, id: str, really: bool) -> None:
        if really:
            self.cancel(id)

    def cancel(self, id: str) -> None:
        known = self.requests.get(id)
        reply = self.world.cancel(id)
        if known is None:
            assert reply == ["GONE"]
        elif known.state not in LIVE:
            assert reply == ["DUPLICATE", known.state]
        else:
            assert reply == ["OK", "CANCELLED"]
            self._end(known, "CANCELLED")
            known.epoch += 1

    @rule(
        id=ids, drift=drift, owner=drift, back=st.integers(-1, 3), count=st.integers(0, 3), flip=st.sampled_from((0, 0, 0, 1))
    )
    def emit(self, id: str, *, drift: int, owner: int, back: int, count: int, flip: int) -> None:
        r = self.requests.get(id) or Request()
        n = len(r.journal)
        first = max(0, n - back)
        tokens = [self._token(id, index) + flip for index in range(first, first + count)]
        epoch, at = max(0, r.epoch + drift), max(0, self.ingress_epoch + owner)
        code, next_index = self.world.emit(id, epoch, first, *tokens, at=at)
        overlap = r.journal[first : first + count]
        if id not in self.requests:
            expected = "GONE"
        elif epoch != r.epoch or at != r.owner:
            expected = "STALE"
        elif r.state not in HELD:
            expected = "STATE"
        elif first > n:
            expected = "GAP"
        elif tokens[: len(overlap)] != overlap:
            expected = "DIVERGED"
        elif len(overlap) == count:
            expected = "DUPLICATE"
        else:
            expected = "OK"
            r.journal += tokens[len(overlap) :]
        assert (code, next_index) == (expected, 0 if expected == "GONE" else len(r.journal))

    @staticmethod
    def _token(id: str, index: int) -> int:
        return 1000 * IDS.index(id) + 2 * index

    @rule(id=ids, drift=drift, owner=drift, short=st.sampled_from((0, 0, 0, 1, -1)))
    def finish(self, id: str, drift: int, owner: int, short: int) -> None:
        r = self.requests.get(id)
        epoch, at = max(0, (r.epoch if r else 0) + drift), max(0, self.ingress_epoch + owner)
        n = max(0, (len(r.journal) if r else 0) - short)
        reply = self.world.call(Fn.FINISH, INGRESS, at, id, epoch, "stop", n, LONG_MS)
        if r is None:
            assert reply == ["GONE"]
        elif epoch != r.epoch or at != r.owner:
            assert reply == ["STALE", r.state]
        elif r.state == "DONE":
            assert reply == ["DUPLICATE", "DONE"]
        elif r.state not in LIVE or (r.state not in HELD and not r.journal):
            assert reply == ["STATE", r.state]
        elif n != len(r.journal):
            assert reply == ["GAP", r.state, len(r.journal)]
        else:
            assert reply == ["OK", "DONE"]
            self._end(r, "DONE")

    @rule(id=ids, take=st.booleans(), stale=st.booleans())
    def resume(self, id: str, take: bool, stale: bool) -> None:
        r = self.requests.get(id)
        at = self.ingress_epoch - stale
        reply = self.world.resume(id, take=take, at=at)
        if r is None:
            assert reply == ["GONE"]
        elif take and stale:
            assert reply == ["STALE"]
        else:
            assert reply[1:4] == [r.state, str(r.epoch), len(r.journal)]
            if take and r.state in LIVE:
                r.owner = at

    @rule()
    def ingress_restarts(self) -> None:
        self.ingress_epoch = int(self.world.call(Fn.INGRESS, INGRESS, "addr", LONG_MS, 0)[1])
        self.world.ingress_epoch = self.ingress_epoch
        orphans = {id for id, r in self.requests.items() if r.state in LIVE and r.owner != self.ingress_epoch}
        assert set(self.world.call(Fn.ORPHANS, INGRESS, 100)[1:]) == orphans

    # core

    @rule(id=ids, p=names, d=names, drift=drift, inc=drift)
    def assign(self, id: str, p: str, d: str, drift: int, inc: int) -> None:
        r = self.requests.get(id)
        epoch = max(0, (r.epoch if r else 0) + drift)
        p_inc = max(0, self.instances[p].incarnation + inc)
        d_inc = self.instances[d].incarnation
        if p == d:
            p_inc = d_inc
            inc = 0
        code, new = self.world.assign(id, p, d, epoch=epoch, p_inc=p_inc, d_inc=d_inc)
        fits = inc == 0 and all(self.instances[x].state == "READY" and not self.instances[x].want_drain for x in (p, d))
        if r is None:
            assert (code, new) == ("GONE", "0")
        elif epoch != r.epoch:
            assert (code, new) == ("STALE", str(r.epoch))
        elif r.state != "QUEUED":
            assert (code, new) == ("STATE", str(r.epoch))
        elif not fits:
            assert (code, new) == ("STALE", str(r.epoch))
        else:
            r.epoch += 1
            assert (code, new) == ("OK", str(r.epoch))
            r.state, r.p, r.d, r.holder, r.has_p_role = "ASSIGNED", (p, p_inc), (d, d_inc), None, True
            r.known = len(r.journal)

    @rule(lapsed=st.sets(ids), expired=st.sets(ids, max_size=1), silent=st.sets(names, max_size=1))
    def reap(self, lapsed: set[str], expired: set[str], silent: set[str]) -> None:
        for id in lapsed:
            self.world.lapse(id)
        for id in expired:
            self.world.expire(id)
        for name in silent:
            self.world.silence(name)
        expected: dict[str, str] = {}
        for id in expired & self.requests.keys():
            if self.requests[id].state in LIVE:
                self._end(self.requests[id], "EXPIRED")
                expected[id] = "EXPIRED"
        lost = [name for name in silent if self.instances[name].alive]
        for name in lost:
            self._end_incarnation(name, "LOST")
        for id, r in self.requests.items():
            gone = (r.has_p_role and r.p in self.ended) or r.d in self.ended
            if r.state in PLACED and (gone or id in lapsed):
                by_holder = r.holder in self.ended or (not gone and r.holder is not None)
                # Two reasons at once: the ended incarnations are taken first, each by itself.
                self._give_up(r, counts=by_holder if gone else r.state in HELD)
                expected[id] = r.state
        outcomes, lost_now = self.world.reap(lost_ms=1_000_000, max_attempts=MAX_ATTEMPTS)
        self.ended.clear()
        assert lost_now == lost
        assert outcomes == expected

    @rule()
    def leader_changes(self) -> None:
        assert self.world.call(Fn.LEAD, "rival", LONG_MS, 0)[2] == 0
        former = self.world.leader_epoch
        self.world.leader_epoch = int(self.world.call(Fn.LEAD, LEADER, LONG_MS, 0)[1])
        assert self.world.leader_epoch == former + 1
        assert self.world.call(Fn.REAP, LEADER, former, 10, 3, 0, LONG_MS) == ["NOT_LEADER"]

    # workers

    @rule(
        name=names,
        kind=troubles,
    )
    def trouble(self, name: str, kind: str) -> None:
        match kind:
            case "register":
                self.register(name)
            case "deregister" | "stale":
                self.deregister(name, -1 if kind == "stale" else 0)
            case "drain" | "undrain":
                self.drain(name, drain=kind == "drain")
            case state:
                self.renew_state(name, state)

    def register(self, name: str) -> None:
        i = self.instances[name]
        if i.alive:
            self._end_incarnation(name, "LOST")
        i.want_drain = i.want_drain and i.state != "STOPPED"
        i.incarnation += 1
        i.state = "STARTING"
        reply = self.world.call(Fn.REGISTER, name, "combined", f"addr:{name}", "card")
        assert reply[:2] == ["OK", str(i.incarnation)]

    def deregister(self, name: str, drift: int) -> None:
        i = self.instances[name]
        reply = self.world.call(Fn.DEREGISTER, name, max(0, i.incarnation + drift))
        assert reply == (["OK"] if drift == 0 else ["STALE"])
        if drift == 0:
            self._end_incarnation(name, "STOPPED")

    def renew_state(self, name: str, state: str) -> None:
        i = self.instances[name]
        reply = self.world.renew(name, i.incarnation, state=state)
        if not i.alive:
            assert reply == ["STALE"]
        elif state == "STARTING" and i.state != "STARTING":
            assert reply == ["STATE", i.state]
        else:
            assert reply[0] == "OK" and reply[2] == str(int(i.want_drain))
            i.state = state

    @rule(name=names, drift=drift, what=st.sampled_from("he"), epoch_drift=drift)
    def renew_requests(self, name: str, drift: int, what: str, epoch_drift: int) -> None:
        i = self.instances[name]
        incarnation = max(0, i.incarnation + drift)
        items = [(id, max(0, r.epoch + epoch_drift), what) for id, r in self.requests.items()]
        state = i.state if i.alive else "READY"
        reply = self.world.renew(name, incarnation, *items, state=state)
        if drift or not i.alive:
            assert reply == ["STALE"]
            return
        me = (name, incarnation)
        mine = {
            id
            for (id, epoch, _), r in zip(items, self.requests.values(), strict=True)
            if epoch == r.epoch and ((what == "h" and r.holder == me) or (what == "e" and r.state in LIVE and me in (r.p, r.d)))
        }
        assert set(reply[4:]) == self.requests.keys() - mine

    def drain(self, name: str, drain: bool) -> None:
        assert self.world.call(Fn.DRAIN, name, int(drain)) == ["OK"]
        self.instances[name].want_drain = drain

    @rule(name=names, drift=drift, ack=st.booleans())
    def pick(self, name: str, drift: int, ack: bool) -> None:
        i = self.instances[name]
        incarnation = max(0, i.incarnation + drift)
        if drift or not i.alive:
            assert self.world.call(Fn.PICK, name, incarnation, 0, 64, LONG_MS) == ["STALE"]
            return
        me = (name, incarnation)
        entries = self.world.pick(name, incarnation)
        told = {(entry.kind, entry.id, entry.epoch) for entry in entries}
        for entry in entries:
            r = self.requests[entry.id]
            assert entry.epoch <= r.epoch
            if entry.kind in ("prefill", "expect"):
                assert entry.epoch == r.epoch and r.state in PLACED
                assert entry.journal == _plain(pack_tokens(r.journal[: r.known]))
                peer = r.d if entry.kind == "prefill" else r.p
                assert (entry.peer_inst, int(entry.peer_inc)) == peer
            elif entry.kind == "revoke":
                assert entry.epoch < r.epoch or r.state not in PLACED, "never revokes what it runs"
        for id, r in self.requests.items():
            if r.state == "ASSIGNED" and r.p == me:
                assert ("prefill", id, r.epoch) in told
                r.state, r.holder = "PREFILLING", me
        if ack and entries:
            assert self.world.pick(name, incarnation, ack=entries[-1].seq) == []

    @rule(id=ids, name=names, drift=drift, inc=drift, right=st.sampled_from((True, True, False)))
    def handoff(self, id: str, name: str, drift: int, inc: int, right: bool) -> None:
        r = self.requests.get(id)
        if right and r is not None and r.d is not None:
            name = r.d[0]
        epoch = max(0, (r.epoch if r else 0) + drift)
        me = (name, max(0, self.instances[name].incarnation + inc))
        reply = self.world.handoff(id, epoch, *me)
        if r is None:
            assert reply == ["GONE"]
        elif epoch != r.epoch or inc != 0 or not self.instances[name].alive:
            assert reply == ["STALE", r.state]
        elif r.state not in HELD:
            assert reply == ["STATE", r.state]
        elif r.d != me:
            assert reply == ["STALE", r.state]
        elif r.state == "DECODING":
            assert reply == ["DUPLICATE", "DECODING"]
        else:
            assert reply == ["OK", "DECODING"]
            r.state, r.holder, r.has_p_role = "DECODING", me, False

    @rule(id=ids, name=names, drift=drift, inc=drift, retryable=st.booleans(), poison=st.booleans())
    def fail(self, id: str, name: str, *, drift: int, inc: int, retryable: bool, poison: bool) -> None:
        r = self.requests.get(id)
        epoch = max(0, (r.epoch if r else 0) + drift)
        me = (name, max(0, self.instances[name].incarnation + inc))
        reply = self.world.fail(id, epoch, *me, retryable=retryable, poison=poison, max_attempts=MAX_ATTEMPTS)
        if r is None:
            assert reply == ["GONE"]
        elif epoch != r.epoch or inc != 0 or not self.instances[name].alive:
            assert reply == ["STALE"]
        elif r.state not in PLACED:
            assert reply == ["OK", r.state]
        elif not (r.d == me or (r.has_p_role and r.p == me)):
            assert reply == ["STALE"]
        else:
            if retryable:
                self._give_up(r, counts=True, last="DEAD" if poison else "FAILED")
            else:
                self._end(r, "FAILED")
            assert reply == ["OK", r.state]


def _plain(value: bytes) -> Any:
    return value.decode() if value.isascii() else value


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server of its own: every example empties it."""
    for server in start_server(tmp_path):
        yield server.url


@pytest.mark.timeout(400)  # a failure is shrunk first
def test_the_store_does_what_the_model_says(url: str) -> None:
    machine = type("Machine", (StoreMachine,), {"url": url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=70, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), database=None
        ),
    )

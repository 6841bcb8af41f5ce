"""The core against a store that answers in any order, late, or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.core import OrchestratorCore
from orchestrator.control.settings import CoreSettings
from orchestrator.control.story import replay
from orchestrator.domain.instance import InstanceState
from orchestrator.domain.request import RequestState
from orchestrator.policy.admission import AdmissionLimits
from orchestrator.policy.placement import PlacementRules
from tests.support.core_world import CoreWorld, a_request, an_instance, capabilities

pytestmark = pytest.mark.timeout(400)  # seconds when it holds; a failure is made small first, which takes minutes

LIMITS = AdmissionLimits(window_steps=2, min_prefills=2)
ROLES = ("prefill", "decode", "combined")


class CoreMachine(RuleBasedStateMachine):
    """Rules are what the world may do; invariants are what the core promises whatever the world does."""

    @initialize(
        sizes=st.lists(st.integers(8, 64), min_size=2, max_size=5),
        roles=st.lists(st.sampled_from(ROLES), min_size=5, max_size=5),
    )
    def start(self, sizes: list[int], roles: list[str]) -> None:
        self.world = CoreWorld(CoreSettings(rules=PlacementRules(admission=LIMITS), batch_requests=3, lease_s=1.0, lost_s=1.0))
        for at, (blocks, role) in enumerate(zip(sizes, ["prefill", "decode", *roles][: len(sizes)], strict=True)):
            self.world.add(an_instance(f"{role}-{at}", caps=capabilities(blocks=blocks, batch_tokens=256)))
        self.serial = 0
        self.asked: dict[str, do.Assign] = {}
        self.feed(on.Ticked())

    # What happens around the core.

    @rule(
        sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=4), priority=st.integers(-1, 1)
    )
    def submit(self, sizes: list[tuple[int, int]], priority: int) -> None:
        for prompt, max_tokens in sizes:
            self.world.submit(a_request(f"r{self.serial}", prompt=prompt, max_tokens=max_tokens, priority=priority))
            self.serial += 1

    @rule()
    def look(self) -> None:
        """A hint, late enough for another view, whose answer comes before that of anything else."""
        self.world.clock.advance(0.005)
        self.feed(on.Hinted())
        for effect in [effect for effect in self.world.pending if isinstance(effect, do.ReadView)]:
            self.world.pending.remove(effect)
            self.feed(self.world.execute(effect))

    @rule(milliseconds=st.integers(0, 300), beating=st.booleans())
    def wait(self, milliseconds: int, beating: bool) -> None:
        self.world.clock.advance(milliseconds / 1000)
        if beating:
            self.world.beat()
        self.feed(on.Ticked())

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        effect = data.draw(st.sampled_from(self.world.pending))
        self.world.pending.remove(effect)
        outcome = self.world.execute(effect)
        self.settle(effect)
        self.feed(outcome)

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), rarely=st.integers(0, 3))
    def lose_the_store(self, data: st.DataObject, rarely: int) -> None:
        """Every call under way fails; which of them took effect nobody knows."""
        if rarely:
            return
        for effect in list(self.world.pending):
            if data.draw(st.booleans()):
                self.world.execute(effect)
            self.world.pending.remove(effect)
            self.settle(effect)
        self.feed(on.StoreLost("chaos"))
        self.feed(on.StoreBack())

    @rule(data=st.data())
    def move_a_request(self, data: st.DataObject) -> None:
        moves = {RequestState.ASSIGNED: (self.world.hand_over, self.world.requeue), RequestState.DECODING: (self.world.finish,)}
        able = [(name, move) for name, state in self.world.states().items() for move in moves.get(state, ())]
        if able:
            name, move = data.draw(st.sampled_from(able))
            move(name)

    @rule(data=st.data(), state=st.sampled_from([InstanceState.READY, InstanceState.DRAINING]), drain=st.booleans())
    def change_an_instance(self, data: st.DataObject, state: InstanceState, drain: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.instances)))
        self.world.instances[name] = replace(
            self.world.instances[name], state=state, want_drain=drain, beat_ms=self.world.now_ms
        )

    @rule(data=st.data())
    def restart_an_instance(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.instances)))
        for request, held in self.world.requests.items():
            if held.assignment is not None and name in (held.assignment.prefill, held.assignment.decode):
                self.world.requeue(request)
        instance = self.world.instances[name]
        self.world.instances[name] = replace(instance, incarnation=instance.incarnation + 1, state=InstanceState.READY)

    @rule(theirs=st.booleans(), rarely=st.integers(0, 3))
    def change_leader(self, theirs: bool, rarely: int) -> None:
        if rarely:
            return
        self.world.leader = ("them" if theirs else "", self.world.leader[1] + 1)

    # What the core promises.

    def feed(self, event: on.Event) -> None:
        if isinstance(event, on.LeadershipLost | on.LeadershipGained | on.LeadershipDenied):
            self.asked.clear()
        for effect in self.world.feed(event):
            if isinstance(effect, do.Assign):
                self.check_batch(effect)
        if self.world.core.status.epoch == 0:
            self.asked.clear()

    def settle(self, effect: do.Effect) -> None:
        if isinstance(effect, do.Assign):
            for item in effect.items:
                self.asked.pop(item.request_id, None)

    def check_batch(self, batch: do.Assign) -> None:
        assert 1 <= len(batch.items) <= 3
        assert len({item.prefill for item in batch.items}) == 1
        assert batch.epoch == self.world.core.status.epoch != 0
        for item in batch.items:
            assert item.request_id not in self.asked, f"{item.request_id} is under way already"
            self.asked[item.request_id] = batch
            caps = [self.world.instances[name].capabilities for name in (item.prefill, item.decode)]
            assert caps[0] is not None
            assert caps[1] is not None
            assert caps[0].fingerprint == caps[1].fingerprint

    @invariant()
    def pools_are_never_promised_twice(self) -> None:
        if not hasattr(self, "world"):
            return
        for instance in self.world.instances.values():
            assert instance.capabilities is not None
            assert instance.reserved_blocks <= instance.capabilities.total_blocks, f"{instance.instance_id} is over-committed"
            assert instance.decode_requests <= instance.capabilities.max_running
            window = LIMITS.window_steps * instance.capabilities.max_batch_tokens
            assert instance.prefill_requests <= LIMITS.min_prefills or instance.prefill_tokens <= window

    @invariant()
    def one_of_each_question_at_most(self) -> None:
        if hasattr(self, "world"):
            views = [effect for effect in self.world.pending if isinstance(effect, do.ReadView)]
            assert len(views) <= 1

    def teardown(self) -> None:
        """Left in peace, the core places all that fits; and its log replays to itself."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.leader = ("", world.leader[1] + 1)
        for name, instance in world.instances.items():
            world.instances[name] = replace(instance, state=InstanceState.READY, want_drain=False, beat_ms=world.now_ms)
        for _ in range(20 + 4 * len(world.requests)):
            world.run(0.15)
            for name, state in world.states().items():
                if state is RequestState.ASSIGNED:
                    world.hand_over(name)
                    world.finish(name)
                elif state is RequestState.DECODING:
                    world.finish(name)
            if not world.queue():
                break
        left = {name for name, state in world.states().items() if state is RequestState.QUEUED}
        told = {
            entry.what.request_id
            for entry in world.recorder
            if isinstance(entry.what, do.Explain) and entry.what.reason.name == "NEVER_FITS"
        }
        assert left <= told, f"starved: {left - told}"
        log = list(world.recorder)
        assert replay(OrchestratorCore(world.settings, 0.0), log) == log


CoreMachine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCore = CoreMachine.TestCase

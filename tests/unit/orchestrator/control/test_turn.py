"""Order, passing and holding: nobody waits behind what he could pass, and nobody is passed for ever."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.control.inventory import Inventory
from orchestrator.control.settings import CoreSettings
from orchestrator.control.turn import Patience, TurnPlan, plan_turn
from orchestrator.domain.instance import InstanceView
from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.placement import WaitReason
from tests.support.core_world import CoreWorld, a_request, a_view, an_instance, assigned

P0, D0, D1 = an_instance("prefill-0"), an_instance("decode-0"), an_instance("decode-1")
LONG = a_request("long", prompt=800, max_tokens=160)  # 60 of 64 blocks
SETTINGS = CoreSettings(patience_s=1.0)


def turn(
    instances: Sequence[InstanceView], queued: Sequence[QueuedRequest], patience: Patience | None = None, now_s: float = 0.0
) -> TurnPlan:
    return plan_turn(a_view(instances, queued), Inventory(), SETTINGS, patience or Patience(), now_s)


def placed(plan: TurnPlan) -> dict[str, str]:
    return {assignment.request_id: assignment.decode for assignment, _ in plan.assignments}


def test_the_order_of_the_view_is_the_order_of_decisions() -> None:
    plan = turn([P0, D0], [a_request(f"r{at}", prompt=10, max_tokens=6) for at in range(5)])
    assert [assignment.request_id for assignment, _ in plan.assignments] == ["r0", "r1", "r2", "r3", "r4"]


def test_a_long_request_is_passed_by_those_that_fit() -> None:
    busy = an_instance("decode-0", decode_blocks=10)
    plan = turn([P0, busy], [LONG, a_request("r1"), a_request("r2")], now_s=5.0)
    assert placed(plan) == {"r1": "decode-0", "r2": "decode-0"}
    assert plan.waits == {"long": WaitReason.DECODE_FULL}
    assert plan.patience.passed_since_s == {"long": 5.0}
    assert plan.patience.hold is None


def test_nobody_is_passed_when_nothing_follows_or_nothing_fits() -> None:
    full = an_instance("decode-0", decode_blocks=64)
    assert turn([P0, full], [LONG, a_request("r1")]).patience.passed_since_s == {}
    assert turn([P0, an_instance("decode-0", decode_blocks=10)], [a_request("r1"), LONG]).patience.passed_since_s == {}


def test_after_its_patience_an_instance_is_held_for_it() -> None:
    busy, busier = an_instance("decode-0", decode_blocks=10), an_instance("decode-1", decode_blocks=20)
    queue = [LONG, *(a_request(f"r{at}") for at in range(3))]
    first = turn([P0, busy, busier], queue, Patience({LONG.request_id: 0.0}), now_s=1.0)
    assert first.patience.hold is not None
    assert first.patience.hold.instances == {"decode-0"}
    assert set(placed(first).values()) == {"decode-1"}
    second = turn([P0, busy, busier], queue, first.patience, now_s=1.1)
    assert set(placed(second).values()) == {"decode-1"}
    third = turn([P0, an_instance("decode-0", decode_blocks=4), busier], queue, second.patience, now_s=1.2)
    assert placed(third)["long"] == "decode-0"
    assert third.patience.hold is None
    assert "long" not in third.patience.passed_since_s


def test_a_hold_stays_where_it_is_while_other_instances_change_places() -> None:
    busy, busier = an_instance("decode-0", decode_blocks=10), an_instance("decode-1", decode_blocks=20)
    first = turn([P0, busy, busier], [LONG], Patience({LONG.request_id: 0.0}), now_s=1.0)
    swapped = turn(
        [P0, an_instance("decode-0", decode_blocks=20), an_instance("decode-1", decode_blocks=10)],
        [LONG, a_request("r1")],
        first.patience,
        now_s=1.1,
    )
    assert swapped.patience.hold == first.patience.hold
    assert placed(swapped) == {"r1": "decode-1"}


def test_a_hold_ends_with_its_request_and_moves_when_its_instance_is_gone() -> None:
    busy, busier = an_instance("decode-0", decode_blocks=10), an_instance("decode-1", decode_blocks=20)
    held = turn([P0, busy, busier], [LONG], Patience({LONG.request_id: 0.0}), now_s=1.0).patience
    assert turn([P0, busy, busier], [a_request("r1")], held, now_s=1.1).patience == Patience()
    moved = turn([P0, busier], [LONG], held, now_s=1.1).patience
    assert moved.hold is not None
    assert moved.hold.instances == {"decode-1"}


def test_a_higher_class_goes_first_and_through_a_hold() -> None:
    busy = an_instance("decode-0", decode_blocks=10)
    held = turn([P0, busy], [LONG], Patience({LONG.request_id: 0.0}), now_s=1.0).patience
    plan = turn([P0, busy], [a_request("urgent", priority=1), LONG, a_request("r1")], held, now_s=1.1)
    assert placed(plan) == {"urgent": "decode-0"}


def test_what_fits_nowhere_holds_nothing_and_stops_nobody() -> None:
    hopeless = a_request("hopeless", prompt=4000)
    plan = turn([P0, D0], [hopeless, a_request("r1")], Patience({hopeless.request_id: 0.0}), now_s=9.0)
    assert placed(plan) == {"r1": "decode-0"}
    assert plan.waits == {"hopeless": WaitReason.NEVER_FITS}
    assert plan.patience.hold is None


def test_requests_under_way_are_left_alone() -> None:
    inventory = Inventory()
    inventory.add(1, turn([P0, D0], [a_request("r1")]).assignments)
    plan = plan_turn(a_view([P0, D0], [a_request("r1"), a_request("r2")]), inventory, SETTINGS, Patience(), 0.0)
    assert placed(plan) == {"r2": "decode-0"}


def test_loads_of_one_turn_add_up() -> None:
    plan = turn([P0, D0, D1], [a_request(f"r{at}", prompt=300, max_tokens=84) for at in range(9)])  # 24 blocks, 19 on P
    # The fourth prompt would not fit the pool of prefill-0.
    assert placed(plan) == {"r0": "decode-0", "r1": "decode-1", "r2": "decode-0"}


def test_a_stream_of_short_requests_cannot_starve_a_long_one() -> None:
    world = CoreWorld(CoreSettings(patience_s=1.0))
    for name in ("prefill-0", "decode-0", "decode-1"):
        world.add(an_instance(name))
    world.run(0.2)
    running: list[tuple[float, str]] = []
    serial, long_at_s = 0, -1.0
    world_start_s = world.clock.now_s()
    while world.clock.now_s() < world_start_s + 20.0:
        for _ in range(2):
            world.submit(a_request(f"s{serial}", prompt=100, max_tokens=156))  # 16 blocks: four fill a pool
            serial += 1
        if serial == 20:
            world.submit(LONG)
        for name, (_, decode) in assigned(world.run(0.1)).items():
            running.append((world.clock.now_s() + 0.5, name))
            if name == "long":
                long_at_s = world.clock.now_s()
                assert decode in {"decode-0", "decode-1"}
        for end_s, name in list(running):
            if end_s <= world.clock.now_s():
                running.remove((end_s, name))
                world.hand_over(name)
                world.finish(name)
    assert 0 < long_at_s - world_start_s < 1.0 + 1.0 + 1.5, "submitted after 1 s, patience 1 s, then the pool runs empty"

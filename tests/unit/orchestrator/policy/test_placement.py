"""Where requests go: filter, score, pick."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from orchestrator.control.board import Board
from orchestrator.domain.instance import InstanceView
from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.load import load_of
from orchestrator.policy.placement import Placement, PlacementRules, WaitReason, place, shortest_wait
from tests.support.core_world import a_request, an_instance, capabilities

P0, P1 = an_instance("prefill-0"), an_instance("prefill-1")
D0, D1 = an_instance("decode-0"), an_instance("decode-1")
C0 = an_instance("combined-0")


def decide(
    instances: Sequence[InstanceView],
    request: QueuedRequest | None = None,
    *,
    prefill_ready: bool | None = None,
    local_prefill: bool = True,
    barred: frozenset[str] = frozenset(),
) -> Placement | WaitReason:
    rules = PlacementRules(local_prefill=local_prefill)
    ready = any(item.role == "prefill" for item in instances) if prefill_ready is None else prefill_ready
    board = Board([load_of(item) for item in instances], ready, rules)
    return place(request or a_request(), board.candidates, rules, barred)


def pair(decision: Placement | WaitReason) -> tuple[str, str]:
    assert isinstance(decision, Placement), decision
    return decision.prefill, decision.decode


def test_blocks_of_a_pair_and_of_one_instance() -> None:
    assert decide([P0, D0]) == Placement("prefill-0", "decode-0", 7, 8)
    assert decide([C0]) == Placement("combined-0", "combined-0", 0, 8)


@pytest.mark.parametrize("order", [1, -1])
def test_ties_go_to_the_smaller_name_whatever_the_order(order: int) -> None:
    assert pair(decide([P1, D1, P0, D0][::order])) == ("prefill-0", "decode-0")


def test_prefill_goes_where_fewest_tokens_wait() -> None:
    assert pair(decide([an_instance("prefill-0", prefills=1, prefill_tokens=50), P1, D0])) == ("prefill-1", "decode-0")


def test_decode_goes_where_the_smallest_share_is_promised() -> None:
    large = an_instance("decode-0", decode_blocks=20, caps=capabilities(blocks=200))
    small = an_instance("decode-1", decode_blocks=10)
    assert pair(decide([P0, large, small])) == ("prefill-0", "decode-0")


def test_a_full_favourite_is_passed_over() -> None:
    assert pair(decide([P0, an_instance("decode-0", decodes=16), an_instance("decode-1", decode_blocks=40)]))[1] == "decode-1"


def test_both_sides_have_one_fingerprint() -> None:
    other = an_instance("prefill-0", caps=capabilities(fingerprint="other"))
    busy = an_instance("prefill-1", prefills=1, prefill_tokens=100)
    assert pair(decide([other, busy, D0])) == ("prefill-1", "decode-0")
    assert decide([other, D0], prefill_ready=True) is WaitReason.NEVER_FITS


def test_a_decode_instance_prefills_only_while_no_prefill_instance_is_ready() -> None:
    assert pair(decide([D0])) == ("decode-0", "decode-0")
    assert decide([D0], prefill_ready=True) is WaitReason.NO_PREFILL_INSTANCE
    assert decide([D0], local_prefill=False) is WaitReason.NO_PREFILL_INSTANCE


def test_combined_saves_the_hand_off_unless_more_waits_there() -> None:
    assert pair(decide([P0, D0, C0])) == ("combined-0", "combined-0")
    busy = an_instance("combined-0", prefills=1, prefill_tokens=100)
    assert pair(decide([P0, D0, busy])) == ("prefill-0", "decode-0")


def test_a_combined_instance_decodes_for_others() -> None:
    busy = an_instance("combined-0", prefills=2, prefill_tokens=2048)
    assert pair(decide([P0, busy])) == ("prefill-0", "combined-0")


@pytest.mark.parametrize(
    ("instances", "request_", "reason"),
    [
        ([], a_request(), WaitReason.NO_DECODE_INSTANCE),
        ([P0], a_request(), WaitReason.NO_DECODE_INSTANCE),
        ([P0, D0], a_request(prompt=2000), WaitReason.NEVER_FITS),
        ([an_instance("prefill-0", prefills=2, prefill_tokens=2048), D0], a_request(), WaitReason.PREFILL_BUSY),
        ([P0, an_instance("decode-0", decode_blocks=60)], a_request(), WaitReason.DECODE_FULL),
    ],
)
def test_why_a_request_waits(instances: list[InstanceView], request_: QueuedRequest, reason: WaitReason) -> None:
    assert decide(instances, request_) is reason


def test_barred_instances_get_nothing() -> None:
    assert pair(decide([P0, D0, D1], barred=frozenset({"decode-0"}))) == ("prefill-0", "decode-1")
    assert decide([P0, D0], barred=frozenset({"decode-0"})) is WaitReason.HELD
    assert decide([C0], barred=frozenset({"combined-0"})) is WaitReason.HELD
    full = an_instance("decode-0", decode_blocks=60)
    assert decide([P0, full], barred=frozenset({"decode-0"})) is WaitReason.DECODE_FULL


def test_the_shortest_wait_is_at_the_emptiest_pool_that_could_ever_take_it() -> None:
    small = an_instance("decode-0", caps=capabilities(blocks=8))
    nearly, full = an_instance("decode-1", decode_blocks=50), an_instance("decode-2", decode_blocks=64)
    rules = PlacementRules()
    board = Board([load_of(item) for item in (P0, small, nearly, full)], True, rules)
    found = shortest_wait(a_request(prompt=500), board.candidates)
    assert found is not None
    assert [load.instance.instance_id for load in found] == ["prefill-0", "decode-1"]
    assert shortest_wait(a_request(prompt=5000), board.candidates) is None


def test_the_board_keeps_its_orders() -> None:
    rules = PlacementRules()
    board = Board([load_of(item) for item in (P0, P1, D0, D1)], True, rules)
    chosen = []
    for at in range(6):
        request = a_request(f"r{at}", prompt=64)
        decision = place(request, board.candidates, rules)
        assert isinstance(decision, Placement)
        board.charge(request, decision)
        chosen.append(pair(decision))
    assert chosen == [("prefill-0", "decode-0"), ("prefill-1", "decode-1")] * 3

"""When blocks of a shared prefix are moved, and from where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.control.board import Board
from orchestrator.domain.ids import InstanceId
from orchestrator.domain.instance import InstanceState, InstanceView
from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.load import load_of
from orchestrator.policy.placement import Placement, PlacementRules, place
from orchestrator.policy.prefix_source import PrefixRules, PrefixSource, choose_source
from tests.support.core_world import STORE_EPOCH_MS, a_request, an_instance, capabilities

CAPS = replace(capabilities(block_tokens=16), block_bytes=1000)
RULES = PrefixRules(prefill_tokens_per_s=1000.0)


def instance(name: str, **changes: Any) -> InstanceView:
    return an_instance(name, caps=changes.pop("caps", CAPS), **changes)


def having(request: QueuedRequest, **blocks: int) -> QueuedRequest:
    return replace(request, cached=tuple((InstanceId(name.replace("_", "-")), count) for name, count in blocks.items()))


def choose(request: QueuedRequest, *others: InstanceView, rules: PrefixRules = RULES, **target: Any) -> PrefixSource | None:
    here = replace(instance("prefill-0"), **target)
    return choose_source(request, load_of(here), [here, *others], rules, STORE_EPOCH_MS)


def test_the_longest_run_is_taken_and_the_last_token_is_left_to_compute() -> None:
    request = having(a_request(prompt=160), decode_0=10, decode_1=6, prefill_0=2)
    found = choose(request, instance("decode-0"), instance("decode-1"))
    assert found is not None
    assert (found.instance_id, found.blocks) == ("decode-0", 9), "160 tokens are ten blocks, and one token must be computed"
    assert 250 <= found.wait_ms <= 10_000


@pytest.mark.parametrize(
    ("request_", "others", "rules", "target"),
    [
        (having(a_request(prompt=160)), ["decode-0"], RULES, {}),
        (having(a_request(prompt=160), decode_0=3), ["decode-0"], RULES, {}),
        (having(a_request(prompt=160), decode_0=9, prefill_0=6), ["decode-0"], RULES, {}),
        (having(a_request(prompt=160), decode_0=9), [], RULES, {}),
        (having(a_request(prompt=160), prefill_0=9), ["decode-0"], RULES, {}),
        (having(a_request(prompt=160), decode_0=9), ["decode-0"], replace(RULES, enabled=False), {}),
        (having(a_request(prompt=160), decode_0=9), ["decode-0"], replace(RULES, link_bytes_per_s=1e4), {}),
        (having(a_request(prompt=160), decode_0=9), ["decode-0"], RULES, {"prefill_tokens_per_s": 1e5}),
    ],
    ids=[
        "nobody has any", "too few", "most are here", "the holder is not in the view", "only the target has them",
        "switched off", "a slow link", "a fast engine",
    ],
)  # fmt: skip
def test_blocks_stay_where_moving_does_not_pay(
    request_: QueuedRequest, others: list[str], rules: PrefixRules, target: dict[str, Any]
) -> None:
    assert choose(request_, *(instance(name) for name in others), rules=rules, **target) is None


def test_only_instances_that_serve_the_same_and_live_lend() -> None:
    request = having(a_request(prompt=160), decode_0=9)
    assert choose(request, instance("decode-0", caps=replace(CAPS, fingerprint="other"))) is None
    assert choose(request, instance("decode-0", state=InstanceState.LOST)) is None
    assert choose(request, instance("decode-0", state=InstanceState.DRAINING)) is not None


def test_a_request_that_has_no_time_waits_for_nobody() -> None:
    request = having(a_request(prompt=160), decode_0=9)
    assert choose(replace(request, deadline_ms=STORE_EPOCH_MS + 30), instance("decode-0")) is None
    soon = choose(replace(request, deadline_ms=STORE_EPOCH_MS + 400), instance("decode-0"))
    assert soon is not None and soon.wait_ms == 100


def test_of_equal_holders_the_idler_lends() -> None:
    request = having(a_request(prompt=160), prefill_1=9, prefill_2=9)
    found = choose(request, instance("prefill-1", prefill_tokens=50), instance("prefill-2"))
    assert found is not None and found.instance_id == "prefill-2"


def test_the_prefill_goes_where_the_least_is_left_to_compute() -> None:
    loads = [load_of(one) for one in (instance("prefill-0"), instance("prefill-1"), instance("prefill-2", prefill_tokens=300))]
    pool = Board([*loads, load_of(instance("decode-0"))], True, PlacementRules()).candidates

    def chosen(request: QueuedRequest) -> str:
        found = place(request, pool, PlacementRules())
        assert isinstance(found, Placement)
        return found.prefill

    assert chosen(a_request()) == "prefill-0"
    assert chosen(having(a_request(), prefill_1=3)) == "prefill-1"
    assert chosen(having(a_request(), prefill_2=3)) == "prefill-0", "more waits there than the cache saves"
    assert chosen(having(a_request(), prefill_1=2, prefill_0=4)) == "prefill-0"

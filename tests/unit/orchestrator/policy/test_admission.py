"""Whether an instance can take a request, ever and now."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.domain.instance import InstanceView
from orchestrator.policy.admission import (
    AdmissionLimits,
    could_decode,
    could_prefill,
    has_decode_room,
    has_local_room,
    has_prefill_room,
)
from orchestrator.policy.load import Load, load_of, prefill_blocks, whole_blocks
from tests.support.core_world import a_request, an_instance, capabilities

LIMITS = AdmissionLimits(window_steps=2, min_prefills=2)


def load(instance: InstanceView | None = None) -> Load:
    return load_of(instance or an_instance())


def test_blocks_are_rounded_up_and_end_at_the_context() -> None:
    caps = capabilities(block_tokens=16, context=256)
    assert prefill_blocks(a_request(prompt=16), caps) == 1
    assert prefill_blocks(a_request(prompt=17), caps) == 2
    assert prefill_blocks(a_request(prompt=17, output=16), caps) == 3
    assert whole_blocks(a_request(prompt=17, max_tokens=16), caps) == 3
    assert whole_blocks(a_request(prompt=200, max_tokens=4000), caps) == 16
    assert whole_blocks(a_request(prompt=17, max_tokens=16, output=10), caps) == 3


@pytest.mark.parametrize(("prompt", "max_tokens", "fits"), [(900, 124, True), (900, 125, False), (1025, 1, False)])
def test_decode_needs_room_for_the_longest_that_a_request_can_get(prompt: int, max_tokens: int, fits: bool) -> None:
    assert could_decode(a_request(prompt=prompt, max_tokens=max_tokens), load()) is fits  # 64 blocks of 16


@pytest.mark.parametrize(("prompt", "fits"), [(1024, True), (1025, False)])
def test_prefill_needs_room_for_the_prompt_alone(prompt: int, fits: bool) -> None:
    assert could_prefill(a_request(prompt=prompt, max_tokens=10_000), load()) is fits


def test_the_context_is_for_prompt_and_one_token_at_least() -> None:
    small = load(an_instance(caps=capabilities(context=128)))
    assert could_prefill(a_request(prompt=127), small)
    assert not could_prefill(a_request(prompt=128), small)
    assert not could_decode(a_request(prompt=100, output=28), small)


def test_another_model_never_fits() -> None:
    other = replace(a_request(), model="other")
    assert not could_prefill(other, load())
    assert not could_decode(other, load())


@pytest.mark.parametrize(
    ("prefills", "waiting", "prompt", "admits"),
    [
        (0, 0, 1000, True),  # longer than the window, but the instance idles
        (1, 1000, 1000, True),  # one is ready behind the one that computes
        (2, 900, 124, True),  # exactly the window of two steps of 512
        (2, 900, 125, False),
        (2, 2000, 1, False),
    ],
)
def test_the_token_window(prefills: int, waiting: int, prompt: int, admits: bool) -> None:
    caps = capabilities(blocks=1000)
    busy = load(an_instance(prefills=prefills, prefill_tokens=waiting, caps=caps))
    assert has_prefill_room(a_request(prompt=prompt), busy, LIMITS) is admits
    assert has_local_room(a_request(prompt=prompt), busy, LIMITS) is admits


def test_prefill_is_bound_by_blocks_too() -> None:
    assert has_prefill_room(a_request(prompt=160), load(an_instance(prefill_blocks=54)), LIMITS)
    assert not has_prefill_room(a_request(prompt=161), load(an_instance(prefill_blocks=54)), LIMITS)
    assert not has_prefill_room(a_request(prompt=160), load(an_instance(prefill_blocks=50, decode_blocks=5)), LIMITS)


def test_decode_is_bound_by_blocks_and_sequences() -> None:
    request = a_request(prompt=100, max_tokens=28)  # eight blocks
    assert has_decode_room(request, load(an_instance("decode-0", decode_blocks=56)))
    assert not has_decode_room(request, load(an_instance("decode-0", decode_blocks=57)))
    assert has_decode_room(request, load(an_instance("decode-0", decodes=15)))
    assert not has_decode_room(request, load(an_instance("decode-0", decodes=16)))


def test_a_promise_is_counted_once_for_each_role() -> None:
    charged = load().with_prefill(100, 7).with_decode(8)
    assert (charged.prefill_requests, charged.prefill_tokens, charged.decode_requests, charged.reserved_blocks) == (
        1,
        100,
        1,
        15,
    )

"""Names and packings of the contract with Redis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract import redis_names as names

IDS = st.text("abcXYZ019_.-", min_size=1, max_size=64)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_tokens_survive_packing(tokens: list[int]) -> None:
    packed = names.pack_tokens(iter(tokens))
    assert len(packed) == 4 * len(tokens)
    assert names.unpack_tokens(packed) == tokens


@given(st.binary(max_size=41))
def test_only_whole_tokens_unpack(packed: bytes) -> None:
    if len(packed) % 4:
        with pytest.raises(ValueError, match="no whole number of uint32"):
            names.unpack_tokens(packed)
    else:
        assert names.pack_tokens(names.unpack_tokens(packed)) == packed


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_out_of_range_does_not_pack(token: int) -> None:
    with pytest.raises(OverflowError):
        names.pack_tokens([token])


@given(IDS, IDS)
def test_every_name_of_a_cluster_is_in_its_slot(cluster: str, thing: str) -> None:
    tag = "{autan:" + cluster + "}"
    made = [
        names.base_key(cluster),
        names.core_channel(cluster),
        names.instance_channel(cluster, thing),
        names.ingress_channel(cluster, thing),
    ]
    assert len(set(made)) == len(made)
    assert all(name.startswith(tag) for name in made)


@pytest.mark.parametrize("bad", ["", "a" * 65, "a}b", "{a", "a:b", "a b", "a\n", "a\0", "é", "a/b", "*"])
def test_what_could_leave_the_slot_is_no_name(bad: str) -> None:
    assert not names.is_name(bad)
    with pytest.raises(ValueError, match="is not of"):
        names.base_key(bad)


def test_functions_belong_to_the_library() -> None:
    assert all(fn.value == f"autan_{fn.name.lower()}" for fn in names.Fn)
    assert all(code.value == code.name for code in names.Code)

"""Names of KV blocks: equal only for equal tokens at equal places of one tenant and one model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract.block_hash import HASH_BYTES, block_hashes, next_hash, packed_block_hashes, root_hash, unpack_names
from protos.contract.redis_names import pack_tokens

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=80)
BLOCK = st.integers(1, 16)
ROOT = root_hash("m", b"salt")


@given(TOKENS, BLOCK)
def test_one_name_per_full_block(tokens: list[int], block_tokens: int) -> None:
    names = block_hashes(ROOT, tokens, block_tokens)
    assert len(names) == len(tokens) // block_tokens
    assert len(set(names)) == len(names)
    assert all(len(name) == HASH_BYTES for name in names)


@given(TOKENS, TOKENS, BLOCK)
def test_a_continuation_keeps_the_names_before_it(tokens: list[int], more: list[int], block_tokens: int) -> None:
    names = block_hashes(ROOT, tokens, block_tokens)
    assert block_hashes(ROOT, tokens + more, block_tokens)[: len(names)] == names


@given(TOKENS, BLOCK)
def test_the_chain_can_be_followed_by_hand(tokens: list[int], block_tokens: int) -> None:
    parent, names = ROOT, []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = next_hash(parent, tokens[start : start + block_tokens])
        names.append(parent)
    assert names == block_hashes(ROOT, tokens, block_tokens)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=64), st.data())
def test_a_changed_token_changes_its_block_and_all_behind_it(tokens: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) // 8 * 8 - 1))
    changed = [*tokens]
    changed[at] ^= data.draw(st.integers(1, 2**32 - 1))
    before, after = block_hashes(ROOT, tokens, 8), block_hashes(ROOT, changed, 8)
    first = at // 8
    assert before[:first] == after[:first]
    assert not set(before[first:]) & set(after[first:])


@given(st.text(max_size=8), st.binary(max_size=8), st.text(max_size=8), st.binary(max_size=8))
def test_models_and_tenants_share_nothing(model: str, salt: bytes, other: str, other_salt: bytes) -> None:
    if "\0" not in model + other:
        same = (model, salt) == (other, other_salt)
        assert (root_hash(model, salt) == root_hash(other, other_salt)) is same


def test_equal_tokens_under_another_block_size_have_other_names() -> None:
    tokens = list(range(16))
    assert not set(block_hashes(ROOT, tokens, 4)) & set(block_hashes(ROOT, tokens, 8))


def test_names_never_change_between_versions() -> None:
    assert [name.hex() for name in block_hashes(ROOT, [1, 2, 3, 4], 2)] == [
        "e3fb7c62b21be72e7c13382397b3811c",
        "88607be4ac495d2c989a6752781f6f84",
    ]


@given(TOKENS, BLOCK)
def test_packed_tokens_have_the_same_names(tokens: list[int], block_tokens: int) -> None:
    names = unpack_names(packed_block_hashes(ROOT, pack_tokens(tokens), block_tokens))
    assert names == block_hashes(ROOT, tokens, block_tokens)


def test_half_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number"):
        unpack_names(b"x" * 17)

"""Fingerprints: one string per distinct fingerprint, and the differing fields by name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protos.wire import common, differing_fields, fingerprint_key

FINGERPRINTS = st.builds(
    common.Fingerprint,
    model=st.text("a|='\\", max_size=4),
    architecture=st.sampled_from(["", "llama", "a|weights_digest=''"]),
    weights_digest=st.text("a|='\\", max_size=4),
    block_tokens=st.integers(0, 3),
)


@given(FINGERPRINTS, FINGERPRINTS)
def test_keys_are_equal_exactly_when_fingerprints_are(ours: common.Fingerprint, theirs: common.Fingerprint) -> None:
    assert (fingerprint_key(ours) == fingerprint_key(theirs)) is (ours == theirs)
    assert (differing_fields(ours, theirs) == []) is (ours == theirs)


def test_every_field_counts_and_is_named() -> None:
    ours = common.Fingerprint()
    for field in common.Fingerprint.DESCRIPTOR.fields:
        theirs = common.Fingerprint()
        setattr(theirs, field.name, "x" if isinstance(getattr(theirs, field.name), str) else 7)
        assert fingerprint_key(ours) != fingerprint_key(theirs)
        (difference,) = differing_fields(ours, theirs)
        assert difference.startswith(f"{field.name}: ")

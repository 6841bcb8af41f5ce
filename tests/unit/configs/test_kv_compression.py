"""Lossy KV and a promise of equal tokens exclude each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema.cluster import ClusterConfig


def cluster(compression: str, deterministic: bool) -> ClusterConfig:
    values: dict[str, Any] = {
        "name": "c",
        "model": {"name": "m", "source": "demo", "deterministic": deterministic},
        "pools": [{"name": "p", "role": "combined", "engine": {"kind": "torch"}}],
        "network": {"kv_compression": compression},
    }
    return ClusterConfig.model_validate(values)


@pytest.mark.parametrize(("compression", "deterministic"), [("none", True), ("lossless", True), ("fp8", False)])
def test_what_keeps_its_word_is_taken(compression: str, deterministic: bool) -> None:
    assert cluster(compression, deterministic).network.kv_compression == compression


def test_fp8_and_deterministic_are_refused_by_the_key() -> None:
    with pytest.raises(ValidationError) as caught:
        cluster("fp8", True)
    assert caught.value.errors()[0]["loc"] == ("network", "kv_compression")


def test_nothing_is_packed_unless_the_file_says_so() -> None:
    assert ClusterConfig.model_fields["network"].default.kv_compression == "none"

"""What `autan status` says of blocks that came from other caches."""

from __future__ import annotations

from orchestrator.cli.status import fetches_text
from protos.wire import common


def test_fetches_in_one_line() -> None:
    one = common.InstanceStats(fetches=2, fetched_blocks=7, fetched_bytes=3_000_000, fetches_failed={"TOO_LATE": 1})
    two = common.InstanceStats(fetches_failed={"TOO_LATE": 1, "OUT_OF_BLOCKS": 3})
    assert fetches_text([one, two]) == (
        "fetched prefixes: 2 prompts, 7 blocks, 3.0 MB; failed: 5, 3 x OUT_OF_BLOCKS, 2 x TOO_LATE"
    )


def test_nothing_is_said_of_nothing() -> None:
    assert fetches_text([common.InstanceStats(lent_blocks=4)]) == ""

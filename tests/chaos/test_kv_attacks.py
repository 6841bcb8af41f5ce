"""Every attack of the catalogue on a running cluster: no wrong token, no leaked block, no dead process. See kv_attacks.py."""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos.kv_attack_cases import catalogue
from tests.chaos.kv_attack_messages import Case, Stage
from tests.chaos.kv_attack_wire import NoEffect
from tests.chaos.kv_attacks import HEADER, Row, attack_all, attack_each, attacked_cluster, line

FEW, MANY = 3, 1000
SEED = 1
IN_FLIGHT = 48


def _assert_held(rows: list[Row], tries: int) -> None:
    print("\n".join([HEADER, *map(line, rows)]))
    assert [row.case for row in rows if row.tries < tries] == [], "attacks that did not take effect"
    assert [f"{row.case}: {fault}" for row in rows for fault in row.faults] == []


@pytest.mark.slow
def test_no_attack_changes_a_token_or_keeps_a_block() -> None:
    _assert_held(asyncio.run(asyncio.wait_for(attack_all(catalogue(), FEW, SEED), 55.0)), FEW)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_attack_of_a_thousand_changes_a_token_or_keeps_a_block() -> None:
    _assert_held(asyncio.run(attack_each(catalogue(), MANY, SEED, IN_FLIGHT)), MANY)


def test_an_attack_that_misses_its_target_or_is_not_refused_is_noticed() -> None:
    """Controls: the harness tells a defence from an attack that never happened, and sees what gets through."""
    idle = Case("idle", "control", Stage.PUSH, lambda rng, me, others, transfer_id: list(me.messages(transfer_id)))
    silent = Case("silent", "control", Stage.OPEN, lambda rng, me, others, true: true)
    harmless = Case("harmless", "control", Stage.PUSH, lambda rng, me, o, t: [*me.messages(t), me.messages(t)[-1]])

    async def controls() -> tuple[Row, list[BaseException]]:
        async with attacked_cluster(SEED) as run:
            row = await run.attack(harmless, 1, 1)
            for case in (idle, silent):
                with pytest.raises(NoEffect):
                    await asyncio.wait_for(run.attack(case, 1, 1), 10.0)
            return row, run.wire.broken

    row, broken = asyncio.run(controls())
    assert row.outcomes == {"commit": 1} and len(row.passed) == 1 and row.faults
    assert len(broken) == 2 and all(isinstance(one, NoEffect) for one in broken)


def test_every_field_of_every_message_is_attacked() -> None:
    names = {case.name for case in catalogue()}
    assert len(names) == len(catalogue()), "a name for each"
    assert {"Open.capability.mac", "Open.fingerprint.dtype", "Push.more.digest", "End.next_token_ids", "Close.epoch"} <= names
    assert {case.source for case in catalogue()} >= {
        "vllm#52234", "CVE-2026-94622", "CVE-2026-94623", "CVE-2026-94626", "CVE-2026-94627", "CVE-2026-105754",
    }  # fmt: skip

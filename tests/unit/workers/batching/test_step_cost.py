"""A decode step does not copy what it does not change."""

from __future__ import annotations

from collections.abc import Sequence

from tests.contract.driver import a_prompt, a_request
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.batching.runner import OnGroups, Sampled, Slice
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner


class RecordingRunner(OracleRunner):
    """Remembers the identities of what it was given."""

    def __init__(self) -> None:
        super().__init__(OracleModel("m"), num_blocks=64, block_tokens=8)
        self.tokens: list[int] = []
        self.tables: list[int] = []
        self.kept: list[object] = []  # an id is unique only among living objects

    def run(self, batch: Sequence[Slice], on_groups: OnGroups | None = None) -> list[Sampled]:
        for work in batch:
            self.tokens.append(id(work.tokens))
            self.tables.append(id(work.block_table))
            self.kept += [work.tokens, work.block_table]
        return super().run(batch, on_groups)


def test_tokens_and_tables_are_passed_on_as_they_are() -> None:
    runner = RecordingRunner()
    engine = PagedEngine(runner, EngineLimits(max_batch_tokens=64, max_running=4))
    engine.add(a_request("r", a_prompt(engine, 40), max_tokens=33))
    while engine.has_work():
        engine.step()
    assert len(runner.tokens) == 33
    assert len(set(runner.tokens)) == 1, "one list for the life of the sequence"
    assert len(set(runner.tables)) == 5, "one table for each number of blocks: 5 for the prompt, then 4 more"


def test_has_work_plans_once() -> None:
    runner = RecordingRunner()
    engine = PagedEngine(runner, EngineLimits(max_batch_tokens=64, max_running=4))
    engine.add(a_request("r", a_prompt(engine, 4)))
    assert engine.has_work()
    planned = engine._plan
    assert engine.has_work()
    assert engine._plan is planned
    engine.add(a_request("s", a_prompt(engine, 4)))
    assert engine._plan is None, "anything that changes makes the plan void"

"""What a step tells of layer groups while it computes is final: the bytes do not change any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.contract.driver import a_request
from tests.support.torch_models import a_runner, random_tokens
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.batching.runner import Runner
from workers.engine_api.types import LayerProgress, Phase
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner
from workers.engines.torch.tiny import write_tiny

# The native kernels, where there are any, share their work among threads.
pytestmark = pytest.mark.usefixtures("two_threads")

CHUNK, TOKENS = 48, 200


def a_torch_runner(kind: str, dtype: str, folder: Path) -> Runner:
    """One layer in each group, so that there are several."""
    runner = a_runner(write_tiny(kind, folder / kind, 3), dtype)
    layout = runner.layout
    runner._cache.layout = replace(layout, target_group_bytes=layout.block_tokens * layout.row_bytes)
    return runner


def check(runner: Runner, groups: int) -> None:
    """Exports at every report what it says is final, and compares after the prompt."""
    engine = PagedEngine(runner, EngineLimits(max_batch_tokens=CHUNK, max_running=4))
    seen: list[tuple[int, int, bytes]] = []
    told: list[tuple[int, int]] = []

    def on_layers(reports: tuple[LayerProgress, ...]) -> None:
        (report,) = reports
        told.append((report.computed_tokens, report.groups))
        table = engine.pin(report.request_id, report.epoch)
        rows = report.computed_tokens // engine.layout.block_tokens
        for place in range(rows):
            seen.extend((table[place], g, bytes(engine.export_kv(table[place], g))) for g in range(report.groups))

    prompt = random_tokens(1, TOKENS, engine.identity.vocab_size)
    engine.add(a_request("r", prompt, phase=Phase.PREFILL))
    engine.add(a_request("mate", random_tokens(2, 9, engine.identity.vocab_size)))
    while engine.has_work():
        assert not engine.step(on_layers).failed
    ends = sorted({computed for computed, _ in told})
    assert ends[-1] == TOKENS and len(ends) > 2
    assert told == [(end, group + 1) for end in ends for group in range(groups)], "each group of each chunk, once, in order"
    assert seen and all(bytes(engine.export_kv(block, group)) == early for block, group, early in seen)
    engine.unpin("r", 1)
    engine.release("r", 1)
    engine.check_integrity()
    engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mistral-small-4", "llama"])
def test_layers_of_the_torch_engine(kind: str, dtype: str, tmp_path: Path) -> None:
    runner = a_torch_runner(kind, dtype, tmp_path)
    check(runner, runner.layout.num_layers)


def test_layers_of_the_oracle() -> None:
    runner = OracleRunner(OracleModel("m"), num_blocks=64, block_tokens=8)
    check(runner, runner.layout.num_groups)

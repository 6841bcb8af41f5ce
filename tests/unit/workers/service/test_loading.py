from __future__ import annotations

import logging
from pathlib import Path

import pytest

from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.loading import loading_line, loading_percent
from workers.engines.torch.tiny import write_tiny
from workers.service.build import build_engine
from workers.service.loading import Loading


def test_lines_are_a_second_apart_and_the_end_is_always_told(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [0.0]
    loading = Loading(lambda: now_s[0])
    assert loading.percent is None
    with caplog.at_level(logging.INFO):
        for done in range(1, 1001):
            now_s[0] += 0.003
            loading("weights", done, 1000)
            assert loading.percent == done // 10
    told = [loading_percent(record.getMessage()) for record in caplog.records]
    assert told == [34, 68, 100]  # a percent every 0.03 s


def test_the_last_line_of_a_log_counts() -> None:
    assert loading_percent("") is None
    assert loading_percent(f"a {loading_line(7)}\nb {loading_line(43)} c\nready at 100 %") == 43


def test_building_an_engine_reaches_the_end(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "m", 1, num_hidden_layers=1)
    loading = Loading()
    model = ModelConfig(name="tiny", source=str(folder), dtype="float32")
    build_engine(model, EngineConfig(kind="torch", num_blocks=4), folder, loading).close()
    assert loading.percent == 100

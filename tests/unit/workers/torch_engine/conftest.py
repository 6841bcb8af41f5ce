from __future__ import annotations

from pathlib import Path

import pytest

from workers.engines.torch.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("models") / "llama", 1)


@pytest.fixture(scope="session")
def tiny_mistral4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("mistral-small-4", tmp_path_factory.mktemp("models") / "mistral4", 2)

"""The demo model for tests, imported once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.engines.torch.demo_model import ensure_demo_model


@pytest.fixture(scope="session")
def demo_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with SmolLM2-135M-Instruct."""
    return ensure_demo_model(tmp_path_factory.mktemp("models"))

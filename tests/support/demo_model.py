"""The demo model for tests, imported once a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.engines.torch.demo_model import ensure_demo_model


@pytest.fixture(scope="session")
def demo_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with SmolLM2-135M-Instruct. The processes of a run share it: its lock lets one of them import it."""
    base = tmp_path_factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return ensure_demo_model(run / "models")

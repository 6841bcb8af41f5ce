"""`autan` as a child process, with a home of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.runtime.run_dir import read_run_files
from tests.support.cluster import oracle_config


@dataclass
class Autan:
    """The command with a home of its own."""

    home: Path
    extra: dict[str, str] = field(default_factory=dict)  # more environment

    def __call__(self, *arguments: str, stdin: str = "", timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator.cli.main", *arguments],
            input=stdin, capture_output=True, text=True, timeout=timeout_s, env=self.environment, check=False,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        # What the command set for this process, which has imported it, is not what a shell has.
        inherited = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
        return {**inherited, "AUTAN_HOME": str(self.home), "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **self.extra}

    def json(self, *arguments: str, **options: Any) -> Any:
        done = self(*arguments, "--json", **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def file(self, name: str, values: dict[str, Any]) -> str:
        path = self.home / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def down_all(self) -> None:
        for entry in read_run_files(self.home):
            self("down", "--cluster", entry.cluster, "--grace", "0")


def cluster_values(name: str, **sections: Any) -> dict[str, Any]:
    values = oracle_config(name).model_dump(mode="json", exclude_defaults=True)
    return {**values, **sections}


@pytest.fixture
def autan() -> Iterator[Autan]:
    with tempfile.TemporaryDirectory(prefix="autan-") as home:  # short: the store's socket lives below it
        command = Autan(Path(home))
        try:
            yield command
        finally:
            command.down_all()

"""What README.md tells a newcomer to type works as it stands (the two set-up commands excepted)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.ingress.auth import load_keys
from tests.support.command import Autan, cluster_values

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.timeout(120)


def first_steps() -> list[str]:
    """The commands of the section, without their comments."""
    section = README.split("## First steps")[1].split("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    .venv/bin/autan ")]
    return [line.split("  #")[0].strip().removeprefix(".venv/bin/autan ") for line in lines]


def python_example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return str(block)


def test_the_first_steps_and_the_python_example(autan: Autan) -> None:
    file = autan.file("readme", cluster_values("readme"))
    steps = first_steps()
    assert [step.split()[0] for step in steps] == ["up", "status", "doctor", "kv", "generate", "down"]
    for step in steps:
        if step == "down":
            done = subprocess.run(
                [sys.executable, "-c", python_example()],
                env=autan.environment, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert len(done.stdout) == 64, "one letter for each token of the oracle"
        arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', step.replace("laptop", file))]
        done = autan(*arguments)
        assert done.returncode == 0, done.stderr


def test_the_python_example_has_under_ten_lines() -> None:
    assert len(python_example().splitlines()) < 10


def test_the_key_file_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)
    entries = json.loads(block.replace("<sha256 of the key, hex>", "0" * 64))
    entries[0]["expires_at"] = re.findall(r'"expires_at": "([^"]+)"', README)[0]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    path.chmod(0o600)
    load_keys(path)


def test_the_pages_that_it_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target

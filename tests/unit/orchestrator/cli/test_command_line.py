"""What `autan` loads, and that all commands are there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import command_line

COMMANDS = [
    *("up", "down", "status", "generate", "requests", "cancel", "migrate", "drain", "undrain", "demo", "doctor"),
    *("kv", "config", "model", "tls"),
]
HEAVY = {"orchestrator.cli.local_cluster", "cryptography", "jinja2", "ray", "redis", "structlog", "torch"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_alone_is_the_one_among_all(name: str) -> None:
    alone, among_all = (CliRunner().invoke(app, [name, "--help"]) for app in (command_line(name), command_line()))
    assert alone.exit_code == among_all.exit_code == 0
    assert alone.stdout == among_all.stdout and "Usage: autan " + name in alone.stdout


def test_what_is_no_command_is_looked_for_among_all() -> None:
    for name in (None, "--help", "statsu"):
        listed = CliRunner().invoke(command_line(name), ["--help"]).stdout
        assert [word for word in COMMANDS if f" {word} " not in listed] == []


def test_asking_a_cluster_loads_nothing_of_serving_one() -> None:
    code = "import sys; from orchestrator.cli.main import command_line; command_line('status'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "orchestrator.client" in loaded and not HEAVY & loaded

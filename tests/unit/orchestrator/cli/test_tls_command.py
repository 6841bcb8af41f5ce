"""`autan tls`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.schema.network import TlsConfig
from orchestrator.cli.main import command_line
from protos.contract.errors import ConfigError
from protos.contract.identity import PeerRole
from tests.support.certificates import forged


def autan(*arguments: str | Path) -> Any:
    """The JSON that the command prints. Raises the error that `main` would map to an exit code."""
    done = CliRunner().invoke(command_line("tls"), ["tls", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return {**json.loads(done.stdout), "exit": done.exit_code}


def test_init_makes_a_set_that_the_cluster_file_takes_and_never_writes_over_it(tmp_path: Path) -> None:
    made = autan("init", tmp_path / "tls", "--cluster", "A.b_c", "--node", "box.example", "--node", "10.0.0.9")
    assert set(made["certificates"]) == set(PeerRole) and made["cluster"] == "A.b_c"
    pairs = {role: made["certificates"][role] for role in ("orchestrator", "worker")}
    TlsConfig.model_validate({"ca": made["ca"], **pairs})
    files = {path: path.read_bytes() for path in (tmp_path / "tls").iterdir()}
    assert {path.stat().st_mode & 0o777 for path in files if path.suffix == ".key"} == {0o600}
    assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700
    for arguments in (("init", tmp_path / "tls"), ("issue", tmp_path / "tls", "worker")):
        with pytest.raises(ConfigError, match="is there already"):
            autan(*arguments)
    assert {path: path.read_bytes() for path in (tmp_path / "tls").iterdir()} == files


def test_issue_adds_and_replaces(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    autan("init", directory, "--cluster", "c")
    before = (directory / "worker.pem").read_bytes()
    assert autan("issue", directory, "worker", "--name", "worker-7")["cert"] == str(directory / "worker-7.pem")
    assert (directory / "worker.pem").read_bytes() == before
    autan("issue", directory, "worker", "--replace", "--days", "2")
    assert (directory / "worker.pem").read_bytes() != before
    for arguments, words in {
        ("issue", directory, "worker", "--name", "../up"): "no name for a pair",
        ("issue", directory, "worker", "--name", "ca", "--replace"): "and not ca",
        ("issue", directory, "worker", "--name", "x", "--node", "box"): "not dialled by host names",
        ("issue", directory, "orchestrator", "--name", "x", "--node", "worker.c.autan"): "no host name",
        ("issue", directory, "orchestrator", "--name", "x", "--node", "a b"): "no host name",
        ("issue", tmp_path / "nowhere", "worker"): "autan tls init",
        ("init", tmp_path / "e", "--cluster", "a b"): "--cluster",
    }.items():
        with pytest.raises(ConfigError, match=words):
            autan(*arguments)


def test_show_tells_whose_and_how_long(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    autan("init", directory, "--cluster", "c", "--days", "30", "--node", "box.example")
    shown = {Path(row["file"]).stem: row for row in autan("show", directory)["certificates"]}
    assert shown["worker"]["who"] == "worker" and shown["worker"]["cluster"] == "c" and shown["worker"]["days_left"] == 29
    assert shown["worker"]["hosts"] == []
    assert "box.example" in shown["orchestrator"]["hosts"]
    past = forged(tmp_path, "past", [], valid_from_days=-3, valid_to_days=-1)
    assert autan("show", past.cert)["exit"] == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.pem file"):
        autan("show", empty)

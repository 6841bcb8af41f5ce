"""The committed stubs are those that the protos give."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.generate import GEN, HERE, generate, stale


@pytest.mark.timeout(120)
def test_stubs_are_fresh(tmp_path: Path) -> None:
    generate(tmp_path)
    assert stale(tmp_path) == []


@pytest.mark.timeout(120)
def test_a_change_is_noticed(tmp_path: Path) -> None:
    generate(tmp_path)
    changed = tmp_path / "autan" / "v1" / "kv_pb2.py"
    changed.write_text(changed.read_text() + "\n")
    (tmp_path / "autan" / "v1" / "extra_pb2.py").touch()
    assert stale(tmp_path) == ["autan/v1/extra_pb2.py", "autan/v1/kv_pb2.py"]


def test_every_proto_has_its_stubs() -> None:
    protos = {path.stem for path in (HERE / "autan" / "v1").glob("*.proto")}
    made = {path.name.removesuffix("_pb2.py") for path in (GEN / "autan" / "v1").glob("*_pb2.py")}
    assert protos == made

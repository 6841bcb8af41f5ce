"""The direction of imports, as pyproject.toml states it, and the list of packages."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from typing import Any

import pytest

from tests.architecture.source import GENERATED, PRODUCT, ROOT, files, imported, name


def _pyproject() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


@pytest.mark.timeout(120)
def test_import_contracts_are_kept() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_with_code_is_a_listed_package() -> None:
    listed = _pyproject()["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for top in PRODUCT for path in (ROOT / top).rglob("*.py")}
    folders |= {path.parent.relative_to(ROOT) for path in GENERATED.rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def test_every_package_has_an_init() -> None:
    listed = _pyproject()["tool"]["setuptools"]["packages"]
    assert [p for p in listed if not (ROOT.joinpath(*p.split(".")) / "__init__.py").is_file()] == []


def test_the_composition_root_alone_sees_both_sides() -> None:
    sees = {name(path) for path in files("orchestrator") for _, what in imported(path) if what.split(".")[0] == "workers"}
    assert sees <= {"orchestrator/cli/up.py"}


def test_configs_import_little() -> None:
    own = {"configs", "pydantic", "pydantic_core", "yaml", "protos"}
    tops = {what.split(".")[0] for path in files("configs") for _, what in imported(path)}
    assert tops - own <= sys.stdlib_module_names
    protos = {what for path in files("configs") for _, what in imported(path) if what.startswith("protos.")}
    assert all(what.startswith("protos.contract.") for what in protos)

"""The files around the code: containers, make targets, pins."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from configs.load import load_cluster
from tests.architecture.source import PRODUCT, ROOT, files, imported, name


def _compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def test_the_compose_file_follows_the_compose_specification() -> None:
    text = (importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    schema = json.loads(text)
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.validate(_compose())
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"services": {"redis": {"image": 3}}})


def test_the_compose_file_and_its_preset_agree() -> None:
    services = _compose()["services"]
    assert set(services) == {"redis", "orchestrator", "ray-head", "prefill", "decode"}
    assert all("healthcheck" in service for service in services.values())
    assert all(set(s.get("depends_on", {})) <= set(services) for s in services.values())
    config = load_cluster("compose")
    assert config.store.url == "redis://redis:6379/0"
    for pool in config.pools:
        (resource,) = pool.resources
        offers = [role for role, service in services.items() if f'"{resource}"' in " ".join(service["command"])]
        assert offers == [pool.name]
    assert config.ingress.address.startswith("127.0.0.1:"), "no certificates there: nothing is published"
    assert not any("ports" in service for service in services.values())
    for title, service in services.items():
        assert title == "redis" or service["environment"]["RAY_AUTH_MODE"] == "token"


def test_the_image_runs_without_root_and_reports_health() -> None:
    steps = (ROOT / "Dockerfile").read_text().splitlines()
    user = next(number for number, step in enumerate(steps) if step.startswith("USER"))
    assert steps[user] != "USER root"
    assert user < next(number for number, step in enumerate(steps) if step.startswith("ENTRYPOINT"))
    assert any(step.startswith("HEALTHCHECK") for step in steps)
    copied = {part for step in steps if step.startswith("COPY") for part in step.split()[1:-1]}
    assert all((ROOT / part).exists() for part in copied)


@pytest.mark.timeout(120)
def test_the_wheel_carries_every_data_file(tmp_path: Path) -> None:
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / file)
    for folder in PRODUCT:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("autan-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    needed = {path for folder in PRODUCT for ending in ("py", "yaml", "lua") for path in (ROOT / folder).rglob(f"*.{ending}")}
    assert {name(path) for path in needed} <= packed
    assert any(path.endswith("licenses/LICENSE") for path in packed)


def test_the_promised_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "check", "bench", "gen", "soak"} <= targets


def test_every_import_comes_from_a_declared_dependency() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in files(*PRODUCT):
        if name(path) == "protos/generate.py":  # a tool of the developer
            continue
        for line, what in imported(path):
            top = what.split(".")[0]
            homes = {canonicalize_name(home) for home in distributions.get(top, [])}
            if top not in {*sys.stdlib_module_names, *PRODUCT, "vllm"} and not homes & declared:
                undeclared.add(f"{name(path)}:{line} {top}")
    assert undeclared == set()


def test_every_declared_dependency_is_pinned_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    pins = {canonicalize_name(package): version.strip() for package, version in split}
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    unpinned = {r.name for r in wanted if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))}
    assert unpinned == set()

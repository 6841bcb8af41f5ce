"""The models and GPUs that capacity planning knows by name, and descriptions of other ones from files."""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from configs.schema.base import Section
from configs.schema.hardware import Hardware
from configs.schema.model_description import ModelDescription
from configs.yaml_tree import MAX_BYTES, Refused, parse
from protos.contract.errors import ConfigError

# What repositories add to a model's name without another architecture.
_VARIANT = re.compile(r"-(fp8|fp4|nvfp4|mxfp4|bf16|int4|int8|awq|gptq|fp4-v\d|nvfp4-v\d|instruct|thinking|base|chat|\d{4})$")
_ROOT = Path(__file__).resolve().parent
Described = TypeVar("Described", bound=Section)


@cache
def models() -> dict[str, ModelDescription]:
    """The models that come with Autan, by name, sorted."""
    return {path.stem: read_description(path, ModelDescription) for path in sorted((_ROOT / "models").glob("*.yaml"))}


@cache
def hardware() -> dict[str, Hardware]:
    """The GPUs that come with Autan, by name, sorted."""
    return {path.stem: read_description(path, Hardware) for path in sorted((_ROOT / "hardware").glob("*.yaml"))}


def model_named(name: str) -> ModelDescription:
    """By name or by one of its names elsewhere, such as a repository; other organisations, weight formats and tunings of a
    known model are that model. Raises ConfigError with the nearest name.
    """
    known = {alias.lower(): model for model in models().values() for alias in (model.name, *model.aliases)}
    if name.lower() in known:
        return known[name.lower()]
    plain = {_plain(alias): model for alias, model in known.items()}
    plain |= {_plain(model.name): model for model in models().values()}
    return plain[_plain(name)] if _plain(name) in plain else _named("model", name, known)


def hardware_named(name: str) -> Hardware:
    """By name or alias. Raises ConfigError with the nearest name."""
    known = {alias.lower(): gpu for gpu in hardware().values() for alias in (gpu.name, *gpu.aliases)}
    return _named("GPU", name, known)


def read_description(path: Path, kind: type[Described]) -> Described:
    """A description from a YAML file. Raises ConfigError that names file, line and key of every mistake."""
    try:
        with path.open("rb") as file:
            document = parse(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except Refused as refused:
        raise ConfigError(f"{path}:{refused.finding.line}: {refused.finding.message}") from refused
    if document.findings:
        raise ConfigError("\n".join(f"{path}:{finding.line}: {finding.message}" for finding in document.findings))
    try:
        return kind.model_validate(document.value)
    except ValidationError as invalid:
        lines = [
            f"{path}:{document.line_of(error['loc'])}: {'.'.join(map(str, error['loc']))}: {error['msg']}"
            for error in invalid.errors(include_url=False)
        ]
        raise ConfigError("\n".join(lines)) from invalid


def _plain(name: str) -> str:
    """Without the organisation, the weight format and the tuning."""
    rest = name.lower().rsplit("/", 1)[-1]
    while (shorter := _VARIANT.sub("", rest)) != rest:
        rest = shorter
    return rest


def _named(what: str, name: str, known: dict[str, Described]) -> Described:
    found = known.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(sorted(known))})"
        raise ConfigError(f"{name}: no such {what}{hint}")
    return found

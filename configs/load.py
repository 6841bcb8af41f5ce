"""Reads cluster files. Every mistake of a file is in one ConfigError, a line each: `FILE:LINE: key.path: what is wrong`."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.schema.base import Section
from configs.schema.cluster import ClusterConfig
from configs.yaml_tree import MAX_BYTES, SCALAR_PATTERNS, Document, Finding, KeyPath, Refused, parse
from protos.contract.errors import ConfigError

_PRESETS = Path(__file__).resolve().parent / "presets"
_SENTENCES = {
    "missing": "missing",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "list_type": "must be a list",
    "string_type": "must be text (quote it)",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}


def preset_names() -> list[str]:
    """The presets that come with Autan, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of a preset. Raises ConfigError, with the nearest names, when there is none."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"{name}: no such preset{_hint(name, names)}")
    return _PRESETS / f"{name}.yaml"


def load_cluster(file: str | Path) -> ClusterConfig:
    """Reads a path or the name of a preset (a file that is called like a preset is reached as `./name`).

    Raises ConfigError that names every mistake with file, line and key path.
    """
    path = preset_path(str(file)) if str(file) in preset_names() else Path(file)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file and no such preset{_hint(str(file), preset_names())}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    return load_bytes(raw, str(file) if path == Path(file) else str(path))


def load_bytes(raw: bytes, source: str) -> ClusterConfig:
    """As load_cluster, for the bytes of a file that is called `source` in messages."""
    try:
        document = parse(raw)
    except Refused as refused:
        raise _config_error(source, [refused.finding]) from refused
    findings = list(document.findings)
    config = None
    try:
        config = ClusterConfig.model_validate(document.value)
    except ValidationError as invalid:
        findings += _schema_findings(invalid, document)
    if findings or config is None:
        raise _config_error(source, findings)
    return config


def dump_effective(config: ClusterConfig) -> str:
    """YAML with every default filled in; `load_bytes` of it gives an equal config."""
    text: str = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or YAML 1.2 would read as something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indents lists below their key."""
        super().increase_indent(flow, False)


for _tag, _pattern, _firsts in SCALAR_PATTERNS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _firsts)


def _config_error(source: str, findings: list[Finding]) -> ConfigError:
    lines = []
    for finding in sorted(set(findings), key=lambda f: (f.line, str(f.path), f.message)):
        where = f"{_shown(finding.path)}: " if finding.path else ""
        lines.append(f"{source}:{finding.line}: {where}{finding.message}")
    return ConfigError("\n".join(lines))


def _schema_findings(invalid: ValidationError, document: Document) -> list[Finding]:
    found = []
    for error in invalid.errors(include_url=False):
        path: KeyPath = tuple(part for part in error["loc"] if part != "[key]")
        if any(path[:length] in document.void for length in range(1, len(path) + 1)):
            continue
        found.append(Finding(document.line_of(path), path, _sentence(error["type"], path, error)))
    return found


def _sentence(kind: str, path: KeyPath, error: Any) -> str:
    if kind == "extra_forbidden":
        return f"unknown key{_hint(str(path[-1]), _keys_at(path[:-1]))}"
    if kind in ("value_error", "refused"):
        return str(error["msg"]).removeprefix("Value error, ")
    said = _SENTENCES.get(kind)
    if said is None:
        said = str(error["msg"]).replace("Input should be", "must be", 1).replace("String should", "must", 1)
    if kind == "missing":
        return said
    shown = repr(error["input"])
    return f"{said}, got {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _keys_at(path: KeyPath) -> list[str]:
    """The declared keys of the section that `path` leads to; empty when it leads to none."""
    kind: Any = ClusterConfig
    for part in path:
        section = _section_in(kind)
        field = section.model_fields.get(str(part)) if section is not None and isinstance(part, str) else None
        kind = field.annotation if field is not None else kind
    section = _section_in(kind)
    return list(section.model_fields) if section is not None else []


def _section_in(kind: Any) -> type[Section] | None:
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind
    found = (_section_in(argument) for argument in typing.get_args(kind))
    return next((section for section in found if section is not None), None)


def _hint(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]}?)"
    return f" (known: {', '.join(known)})" if known else ""


def _shown(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text

"""YAML as a cluster file may use it: plain mappings, lists and scalars, each with the line it stands on.

Everything that makes YAML surprising or dangerous is refused with its line: tags, anchors and aliases, merge keys,
duplicate keys, several documents, tabs as indentation, numbers that are not finite, nesting deeper than 32, more than 1 MiB.
Scalars follow the core schema of YAML 1.2: `on`, `yes` and dates are text, `1e9` is a number.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 32
KeyPath = tuple[str | int, ...]

_STANDARD = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[re.Pattern[str], list[str]]] = {
    _STANDARD + "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    _STANDARD + "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")),
    _STANDARD + "float": (
        re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
        list("-+0123456789."),
    ),
    _STANDARD + "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
}


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Something wrong in the file. `path` may be empty: the file as a whole."""

    line: int
    path: KeyPath
    message: str


class Refused(Exception):
    """The text is no document at all; carries the one finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding


@dataclass(frozen=True, slots=True)
class Document:
    """The value of a file, the line of every key and list item, and what is wrong with single keys and values.

    At the paths in `void` the value could not be read, and None stands in for it.
    """

    value: Any
    lines: dict[KeyPath, int]
    findings: list[Finding] = field(default_factory=list)
    void: set[KeyPath] = field(default_factory=set)

    def line_of(self, path: KeyPath) -> int:
        """The line of the key, or of its nearest ancestor that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Loader(yaml.SafeLoader):
    """The composer of PyYAML without aliases, with bounded depth and with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise Refused(Finding(line, (), "anchors and aliases (&name, *name) are not allowed; write the value out"))
        if self.depth >= MAX_DEPTH:
            raise Refused(Finding(line, (), f"nested deeper than {MAX_DEPTH} levels"))
        self.depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        return node


SCALAR_PATTERNS = [(tag, pattern, firsts) for tag, (pattern, firsts) in _SCALARS.items()]
for _tag, _pattern, _firsts in SCALAR_PATTERNS:
    _Loader.add_implicit_resolver(_tag, _pattern, _firsts)


def parse(raw: bytes) -> Document:
    """Raises Refused when the bytes are no single YAML document whose top is a mapping."""
    text = _decoded(raw)
    _refuse_tabs(text)
    node = _composed(text)
    if node is None:
        raise Refused(Finding(1, (), "the file is empty; a cluster file is a mapping of keys to values"))
    if not isinstance(node, yaml.MappingNode):
        raise Refused(Finding(node.start_mark.line + 1, (), "the top level must be a mapping of keys to values"))
    document = Document(value={}, lines={(): node.start_mark.line + 1})
    document.value.update(_value(node, (), document))
    return document


def _decoded(raw: bytes) -> str:
    if len(raw) > MAX_BYTES:
        raise Refused(Finding(1, (), f"larger than {MAX_BYTES} bytes; this is no cluster file"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Refused(Finding(line, (), f"byte {error.start} is no UTF-8 text")) from error


def _refuse_tabs(text: str) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        indentation = line[: len(line) - len(line.lstrip(" \t"))]
        if "\t" in indentation:
            raise Refused(Finding(number, (), "a tab in the indentation; YAML indents with spaces"))


def _composed(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Refused(Finding(line, (), f"character {error.character!r} is not allowed in YAML")) from error
    try:
        node: yaml.Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.problem, error.context) if part)
        raise Refused(Finding(mark.line + 1 if mark else 1, (), f"no valid YAML: {said}")) from error
    finally:
        loader.dispose()
    return node


def _value(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == _STANDARD + "map":
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == _STANDARD + "seq":
        items = []
        for index, item in enumerate(node.value):
            document.lines[*path, index] = item.start_mark.line + 1
            items.append(_value(item, (*path, index), document))
        return items
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, document)
    return _void(node, path, document, f"tag {_shown(node.tag)} is not allowed; only plain values are")


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STANDARD + "str" or key_node.value == "<<":
            said = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            _note(key_node, path, document, f"{said} is not allowed as a key; keys are plain text")
            continue
        key: str = key_node.value
        inner = (*path, key)
        if key in values:
            _note(key_node, inner, document, f"the key is there already, on line {document.lines[inner]}")
            continue
        document.lines[inner] = key_node.start_mark.line + 1
        values[key] = _value(value_node, inner, document)
    return values


def _scalar(node: yaml.ScalarNode, path: KeyPath, document: Document) -> Any:
    text: str = node.value
    if node.tag == _STANDARD + "str":
        return text
    known = _SCALARS.get(node.tag)
    if known is None:
        return _void(node, path, document, f"tag {_shown(node.tag)} is not allowed; only plain values are")
    kind = node.tag.removeprefix(_STANDARD)
    if known[0].match(text) is None:
        return _void(node, path, document, f"{text!r} is no {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return _integer(node, path, document)
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return number if math.isfinite(number) else _void(node, path, document, f"{text} is not a finite number")


def _integer(node: yaml.ScalarNode, path: KeyPath, document: Document) -> Any:
    text: str = node.value
    if len(text) > 40:
        return _void(node, path, document, f"an integer of {len(text)} digits is out of every range")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _void(node: yaml.Node, path: KeyPath, document: Document, message: str) -> None:
    document.void.add(path)
    _note(node, path, document, message)


def _note(node: yaml.Node, path: KeyPath, document: Document, message: str) -> None:
    document.findings.append(Finding(node.start_mark.line + 1, path, message))


def _shown(tag: str) -> str:
    return tag.replace(_STANDARD, "!!", 1)

"""Grammars for tests: what to ask for, how to judge an answer, and what is meant to hurt."""

from __future__ import annotations

import itertools
import json
import string
from typing import Any

from protos.contract.grammar import Grammar, GrammarKind

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["glad", "sad", "none of both"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "mood", "tags"],
    "additionalProperties": False,
}
PHONE = r"\+[0-9]{2} [0-9]{3}-[0-9]{4}"
SUM = """start: term ("+" term){1,3}
term: NUMBER | "(" NUMBER "-" NUMBER ")"
NUMBER: /[1-9][0-9]{0,3}/
"""
SUM_AS_REGEX = r"T(\+T){1,3}".replace("T", r"([1-9][0-9]{0,3}|\([1-9][0-9]{0,3}-[1-9][0-9]{0,3}\))")


def json_schema(schema: dict[str, Any]) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def regex(pattern: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, pattern)


def lark(text: str) -> Grammar:
    return Grammar(GrammarKind.LARK, text)


def _names(count: int) -> list[str]:
    pairs = (first + second for first, second in itertools.product(string.ascii_lowercase, repeat=2))
    triples = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3))
    return list(itertools.islice(itertools.chain(pairs, triples), count))


def _chain(count: int, pattern: str) -> str:
    names = _names(count + 1)
    rules = [pattern.format(a=a, b=b) for a, b in itertools.pairwise(names)]
    return "\n".join([f"start: {names[0]}", *rules, f'{names[-1]}: "a"'])


def _schema_chain(count: int) -> Grammar:
    names = _names(count + 1)
    steps: dict[str, Any] = {a: {"items": {"$ref": f"#/$defs/{b}"}} for a, b in itertools.pairwise(names)}
    schema = {"$ref": f"#/$defs/{names[0]}", "$defs": {**steps, names[-1]: {"type": "null"}}}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, separators=(",", ":")))


REFUSED: dict[str, tuple[Grammar, str]] = {
    "no JSON": (Grammar(GrammarKind.JSON_SCHEMA, "{nope"), "line 1"),
    "a schema of lists in lists": (Grammar(GrammarKind.JSON_SCHEMA, '{"items":' * 5000 + "{}" + "}" * 5000), "recursion limit"),
    "an unknown type": (json_schema({"type": "frob"}), "frob"),
    "an empty range": (json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "a reference to the network": (json_schema({"$ref": "http://example.com/x.json"}), "example.com"),
    "an intersection that explodes": (
        json_schema({"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(12)]} for i in range(12)]}),
        "json_schema",
    ),
    "an open group": (regex("(a"), "unclosed group"),
    "30,000 groups": (regex("(" * 30_000 + "a" + ")" * 30_000), "nest"),
    "an unknown rule": (lark("start: foo"), "foo"),
    "30,000 parentheses": (lark("start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "nested"),
    "too many lines": (lark(_chain(1500, "{a}: {b}")), "1024"),
    "too long": (regex("a" * 65_537), "65536"),
    "nothing": (regex(""), "empty"),
}
"""Grammars that must not compile, and a word of the reason."""

HOSTILE: dict[str, Grammar] = {
    "6,000 constants": json_schema({"enum": [f"v{i}" for i in range(6000)]}),
    "1,000 patterns": json_schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": f"^a{i}.*b$"} for i in range(1000)}}
    ),
    "a chain of references": _schema_chain(1700),
    "a million items": json_schema({"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}}),
    "nested repetition": regex("(((a?){1,1000}b?){1,1000}c?){1,1000}"),
    "a power set": regex("(a|b)*a(a|b){1000}"),
    "an intersection": lark("start: T\nT: /" + "/ & /".join(f".*{c}.*" for c in string.ascii_lowercase) + "/"),
    "endless recursion": lark("start: start"),
    "ambiguity": lark('start: s\ns: s s s s | s s s | s s | "a" | "aa" | ""'),
    "a chain of rules": lark(_chain(1000, "{a}: {b}")),
    "a chain of repetitions": lark(_chain(1000, "{a}: ({b}?)+")),
    "a chain of terminals": lark(_chain(1000, "{a}: ({b}|/b/)+").upper().replace("START", "start").replace("/B/", "/b/")),
    "4,000 ways": lark("start: " + " | ".join(f'"k{i}" start' for i in range(4000)) + ' | "z"'),
}
"""Grammars that compile, or do not; either way quickly, and the process lives."""

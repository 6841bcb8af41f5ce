"""The printed error tree is the real one, and errors survive pickling and the wire."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from protos import wire
from protos.contract import errors
from protos.contract.errors import AutanError, InternalError, QueueFull, error_from

_LINE = re.compile(r"(?P<indent>[│ ]*)[├└]── (?P<name>\w+)(?P<rest>.*)")


@dataclass(frozen=True)
class Printed:
    """One line of the tree, with what it inherits from the lines above it."""

    name: str
    parent: str
    code: str
    exit_code: int
    retryable: bool


def printed() -> Iterator[Printed]:
    text = errors.__doc__ or ""
    above = [Printed("AutanError", "Exception", "INTERNAL", 1, False)]
    yield above[0]
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        depth = len(match["indent"]) // 4 + 1
        parent = above[depth - 1]
        code = re.match(r" +([A-Z][A-Z_]+)\b", match["rest"])
        leaves = re.search(r"\bexit (\d)", match["rest"])
        entry = Printed(
            name=match["name"],
            parent=parent.name,
            code=code[1] if code else parent.code,
            exit_code=int(leaves[1]) if leaves else parent.exit_code,
            retryable="retryable" in match["rest"] or parent.retryable,
        )
        above[depth:] = [entry]
        yield entry


def classes(root: type[AutanError] = AutanError) -> Iterator[type[AutanError]]:
    if root.__module__ == errors.__name__:
        yield root
    for child in root.__subclasses__():
        yield from classes(child)


def test_the_printed_tree_is_the_real_one() -> None:
    said = {(entry.name, entry.parent) for entry in printed()}
    real = {(kind.__name__, kind.__base__.__name__) for kind in classes() if kind.__base__}
    assert said == real


def test_leaves_have_the_printed_code_exit_and_retry() -> None:
    entries = {entry.name: entry for entry in printed()}
    leaves = [kind for kind in classes() if not kind.__subclasses__()]
    assert len(leaves) > 25
    real = {kind.__name__: (kind.code, kind.exit_code, kind.retryable) for kind in leaves}
    assert real == {name: (entries[name].code, entries[name].exit_code, entries[name].retryable) for name in real}


@pytest.mark.parametrize("kind", list(classes()), ids=lambda kind: kind.__name__)
def test_pickling_and_the_wire_keep_everything(kind: type[AutanError]) -> None:
    error = kind("pool 'x': 3 of 2 blocks", 1.5)
    for copy in (pickle.loads(pickle.dumps(error)), wire.wire_to_error(wire.error_to_wire(error))):
        assert type(copy) is kind
        assert (copy.message, copy.retry_after_s, str(copy)) == ("pool 'x': 3 of 2 blocks", 1.5, "pool 'x': 3 of 2 blocks")


def test_reasons_are_distinct_names() -> None:
    reasons = [errors.reason_of(kind) for kind in classes()]
    assert len(set(reasons)) == len(reasons)
    assert errors.reason_of(QueueFull) == "QUEUE_FULL"


def test_a_reason_of_the_future_becomes_an_internal_error_that_names_it() -> None:
    error = error_from("OUT_OF_COFFEE", "refill", 2.0)
    assert type(error) is InternalError
    assert (str(error), error.retry_after_s) == ("OUT_OF_COFFEE: refill", 2.0)

"""Files and functions stay small enough to be read at one go."""

from __future__ import annotations

import ast

from tests.architecture.source import PRODUCT, ROOT, files, name, tree
from tests.support.order import COSTS_S

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def test_files_are_short() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files(*PRODUCT, "tests")}
    assert len(lengths) > 30
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in files(*PRODUCT):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name(path)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_no_drawer_modules() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [name(path) for path in files(*PRODUCT, "tests") if path.name in drawers] == []


def test_the_costly_test_files_are_there() -> None:
    assert [path for path in COSTS_S if not (ROOT / path).is_file()] == []

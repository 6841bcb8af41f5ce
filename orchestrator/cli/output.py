"""What the commands print: JSON for programs, plain tables for people, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from protos.contract.errors import AutanError

stdout = Console(soft_wrap=True, highlight=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout, nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """One JSON object on one line: a row of a stream."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A plain table that reads without colour."""
    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    # As wide as its cells, whatever the terminal: a cut cell would hide a value.
    console = Console(file=stdout.file, width=max(stdout.width, _natural_width(columns, rows)))
    console.print(table)


def _natural_width(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> int:
    return sum(max(len(str(cell)) for cell in cells) + 2 for cells in zip(columns, *rows, strict=True))


def fail(error: AutanError, as_json: bool = False) -> NoReturn:
    """Prints the error (as JSON on stdout when asked) and exits with its code."""
    if as_json:
        print_json(
            {
                "error": {
                    "code": error.code,
                    "reason": error.reason,
                    "message": error.message,
                    "retryable": error.retryable,
                    "retry_after_s": error.retry_after_s,
                }
            }
        )
    stderr.print(f"autan: {error.message}", markup=False)
    if error.retry_after_s > 0:
        stderr.print(f"  try again in {error.retry_after_s:.1f} s", markup=False)
    raise SystemExit(error.exit_code)

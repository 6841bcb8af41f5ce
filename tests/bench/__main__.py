"""Runs the benchmarks: every module `tests/bench/bench_*.py` has a `main()` that writes `bench/NAME.json` and prints a table.

Usage:
    python -m tests.bench [--list] [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


def names() -> list[str]:
    """The benchmarks that exist."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> None:
    """Command line: see the module's docstring. Exit code 2 for an unknown name."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Runs the benchmarks.")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("name", nargs="*", help="which to run; none: all of them")
    arguments = parser.parse_args()
    known = names()
    unknown = sorted(set(arguments.name) - set(known))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known) or 'none yet'}")
    if arguments.list or not known:
        print("\n".join(known) or "there are no benchmarks yet")
        return
    for name in arguments.name or known:
        print(f"== {name}")
        importlib.import_module(f"tests.bench.bench_{name}").main()


if __name__ == "__main__":
    main()

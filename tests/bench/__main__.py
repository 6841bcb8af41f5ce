"""Runs the benchmarks: every module `tests/bench/bench_*.py` has a `main()` that writes `bench/NAME.json` and prints a table.

Usage:
    python -m tests.bench [--list] [NAME ...] [OPTIONS OF THE ONE BENCHMARK NAMED]
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
    arguments, passed_on = parser.parse_known_args()
    known = names()
    if passed_on and len(arguments.name) != 1:
        parser.error(f"{' '.join(passed_on)}: name the one benchmark that these options are for, before them")
    unknown = sorted(set(arguments.name) - set(known))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known) or 'none yet'}")
    if arguments.list or not known:
        print("\n".join(known) or "there are no benchmarks yet")
        return
    for name in arguments.name or known:
        print(f"== {name}")
        main_of = importlib.import_module(f"tests.bench.bench_{name}").main
        main_of(passed_on) if passed_on else main_of()


if __name__ == "__main__":
    main()

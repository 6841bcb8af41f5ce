"""Makes `protos/gen` from `protos/autan/v1/*.proto`; the only way to make it.

Usage:
    python -m protos.generate            regenerate
    python -m protos.generate --check    exit 1 when the committed stubs are stale
"""

from __future__ import annotations

import argparse
import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
GEN = HERE / "gen"
PINNED = "1.85.1"
_ABSOLUTE = re.compile(r"^(from|import) autan\.v1", flags=re.MULTILINE)


def generate(into: Path) -> None:
    """Writes `_pb2.py`, `_pb2.pyi`, `_pb2_grpc.py` below `into`. Raises SystemExit when grpcio-tools is not the pinned one."""
    have = version("grpcio-tools")
    if have != PINNED:
        raise SystemExit(f"grpcio-tools is {have}, the stubs are made with {PINNED}: pip install grpcio-tools=={PINNED}")
    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "autan" / "v1").glob("*.proto"))
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", "-I.",
            f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}", *sources,
        ],
        cwd=HERE, check=True,
    )  # fmt: skip
    for path in into.rglob("*.py*"):
        text = path.read_text()
        path.write_text(_ABSOLUTE.sub(r"\1 protos.gen.autan.v1", text))
    for folder in (into, into / "autan", into / "autan" / "v1"):
        (folder / "__init__.py").touch()


def stale(fresh: Path) -> list[str]:
    """The files below `fresh` that differ from the committed ones, and those that only one side has."""
    names = {path.relative_to(fresh) for path in fresh.rglob("*.py*")}
    committed = {path.relative_to(GEN) for path in GEN.rglob("*.py*") if "__pycache__" not in path.parts}
    differing = [n for n in names & committed if not filecmp.cmp(fresh / n, GEN / n, shallow=False)]
    return sorted(str(n) for n in [*differing, *(names ^ committed)])


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        if check:
            bad = stale(fresh)
            if bad:
                raise SystemExit("stale generated files, run `make gen`: " + ", ".join(bad))
            return
        shutil.rmtree(GEN, ignore_errors=True)
        shutil.copytree(fresh, GEN)


if __name__ == "__main__":
    main()

"""The environments of NIXL and Mooncake below `.venv-peers`: made once for the pinned requirements."""

from __future__ import annotations

import ctypes
import os
import subprocess
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_VERBS = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")


class PeerMissing(Exception):
    """The environment could not be made."""


@dataclass(frozen=True, slots=True)
class PeerEnv:
    """A Python with one peer in it, what to add to its environment, and the peer's version."""

    python: Path
    version: str
    variables: dict[str, str] = field(default_factory=dict)


def ensure_nixl() -> PeerEnv:
    """Raises PeerMissing."""
    return PeerEnv(*_ensure("nixl"))


def ensure_mooncake() -> PeerEnv:
    """Its library is linked with libibverbs even where only TCP is used. Raises PeerMissing."""
    python, version = _ensure("mooncake")
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return PeerEnv(python, version, {"LD_LIBRARY_PATH": _verbs(python.parents[1] / "verbs")})
    return PeerEnv(python, version)


def _ensure(name: str) -> tuple[Path, str]:
    requirements = ROOT / "tests" / "bench" / "peers" / f"{name}.txt"
    folder = ROOT / ".venv-peers" / name
    python, stamp, wanted = folder / "bin" / "python", folder / "installed.txt", requirements.read_text()
    version = wanted.splitlines()[1].partition("==")[2]
    if python.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return python, version
    print(f"installing {name} into {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    command = [
        str(python),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "-r",
        str(requirements),
    ]
    if subprocess.run(command, check=False).returncode != 0:
        raise PeerMissing(f"{name} could not be installed; measure without it with --peers none or by naming the others")
    stamp.write_text(wanted)
    return python, version


def _verbs(folder: Path) -> str:
    """The library from the distribution's packages, unpacked beside the environment; nothing is installed."""
    if not any(folder.rglob("libibverbs.so.1")):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", *_VERBS], cwd=folder, check=True, capture_output=True)
            for package in folder.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PeerMissing("Mooncake needs libibverbs.so.1: install the package libibverbs1") from error
    return os.pathsep.join(sorted({str(found.parent.resolve()) for found in folder.rglob("lib*.so.*")}))

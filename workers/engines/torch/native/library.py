"""Compiling and loading the kernels. Without a compiler or the needed instructions there are none, and torch does the work."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from configs.env import kernel_cache_dir, native_kernels

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "src"
_NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni", "-mfma"),
)
_COMPILE_TIMEOUT_S = 180.0


class Library:
    """The loaded kernels. Addresses are of contiguous CPU memory that outlives the call; the GIL is free meanwhile."""

    def __init__(self, path: Path) -> None:
        # torch is loaded already, so that both share one OpenMP runtime and its threads.
        handle = ctypes.CDLL(str(path))
        self.run_program = handle.autan_run_program
        self.run_program.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self.run_program.restype = None
        self.flash_tile = handle.autan_flash_tile
        self.flash_tile.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.flash_tile.restype = None


@cache
def load_library() -> Library | None:
    """The kernels, compiled once per machine and version of their source; None, with a logged reason, when impossible.

    `AUTAN_NATIVE=off` turns them off.
    """
    if not native_kernels():
        return None
    missing = _missing_instructions()
    compiler = shutil.which("g++") or shutil.which("c++")
    if missing or compiler is None:
        reason = f"the CPU has no {', '.join(missing)}" if missing else "there is no C++ compiler"
        logger.info("no native CPU kernels: %s; torch's own operators do the work", reason)
        return None
    try:
        return Library(_compiled(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or error
        logger.warning("no native CPU kernels: %s; torch's own operators do the work", str(output)[-2000:])
        return None


def _missing_instructions() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return list(_NEEDED)
    flags = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set[str]())
    return [name for name in _NEEDED if name not in flags]


def _compiled(compiler: str) -> Path:
    """The shared object of these sources. Of several workers that start at once one compiles and the others wait for it."""
    digest = hashlib.sha256("\0".join((compiler, *_FLAGS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    folder = kernel_cache_dir()
    target = folder / f"kernels-{digest.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            return target
        logger.info("compiling the native CPU kernels (some seconds, once)")
        made = Path(scratch) / "kernels.so"
        command = [compiler, *_FLAGS, str(_SOURCES / "autan_native.cpp"), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
        made.replace(target)
    return target


def threads() -> int:
    """The threads that kernels use: torch's."""
    return torch.get_num_threads()

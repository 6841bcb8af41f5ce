"""Folders of disk caches whose instance is gone: `<base>/<instance>`, see workers.kv_tiers.disk_files for what is in them."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from protos.contract.redis_names import is_name

MAX_FOLDERS = 256
"""What one sweep looks at; the next one goes on from there once they are removed."""

_OURS = re.compile(r"lock|segment-[0-9]{5}\.kv")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptFolder:
    """A folder without an owner: how much is in it, whether it was removed, and why not if it may not be."""

    path: Path
    size_bytes: int
    removed: bool = False
    kept_because: str = ""


def sweep(base: Path, owners: Collection[str], apply: bool) -> list[SweptFolder]:
    """The caches below `base` of instances that are not among the `owners`, by name; removes them when it is to `apply`.

    What a process has locked stays, and so does a folder with anything in it that no disk cache made. Symbolic links are not
    followed. Blocks; raises nothing: a folder that cannot be removed says why.
    """
    found: list[SweptFolder] = []
    with suppress(OSError):
        for path in sorted(base.iterdir()):
            if path.name in owners or not is_name(path.name) or path.is_symlink() or not path.is_dir():
                continue
            found.append(_swept(path, apply))
            if len(found) == MAX_FOLDERS:
                break
    return found


def _swept(path: Path, apply: bool) -> SweptFolder:
    size = 0
    try:
        files = sorted(path.iterdir())
        for file in files:
            status = file.lstat()
            if _OURS.fullmatch(file.name) is None or not stat.S_ISREG(status.st_mode):
                return SweptFolder(path=path, size_bytes=size, kept_because=f"{file.name} is no file of a disk cache")
            size += status.st_blocks * 512
        kept_because = _remove(path, files, apply)
        return SweptFolder(path=path, size_bytes=size, removed=apply and not kept_because, kept_because=kept_because)
    except OSError as error:
        return SweptFolder(path=path, size_bytes=size, kept_because=str(error))


def _remove(path: Path, files: list[Path], apply: bool) -> str:
    """Takes the lock that a worker would hold, and lets it go last; says why the folder may not go. Raises OSError."""
    lock = path / "lock"
    if lock not in files:
        return "it has no lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "a process has it locked"
        if apply:
            for file in files:
                if file != lock:
                    file.unlink()
            lock.unlink()
            path.rmdir()
        return ""
    finally:
        os.close(descriptor)

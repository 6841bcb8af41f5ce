"""How much memory loading takes, for every format and layout, measured as the peak of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.native_params import Layout
from workers.engines.torch.tiny import write_tiny
from workers.engines.torch.tiny_files import LAYOUTS, Encoding

# What one expert's matrix, its decoded chunks and the allocator's rounding take beside the weights.
SLACK_BYTES = 32e6
BIG: dict[str, Any] = {
    "hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 8, "num_hidden_layers": 3, "q_lora_rank": 64,
}  # fmt: skip
BF16_BYTES = 172e6

# Measures each case in a fork of its own: all that a process needs takes seconds to import.
PEAK = """
import json, os, re, sys, torch
from pathlib import Path
from workers.engines.torch.config import read_config
from workers.engines.torch.registry import load_decoder
from tests.support.torch_models import a_runner
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def measure(folder, tiny, how):
    a_runner(Path(tiny)).close()
    before, folder = peak(), Path(folder)
    config, cpu = read_config(folder), torch.device("cpu")
    decoder = load_decoder(config, folder, torch.bfloat16, cpu, compressed=how == "kept")
    print(peak() - before, flush=True)
assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads do not live on in a fork"
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        measure(*json.loads(line))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("failed", flush=True)
"""

Measure = Callable[[Path, Path, str], int]


@pytest.fixture(scope="module")
def measure() -> Iterator[Measure]:
    """The bytes by which the peak of a process that ran the tiny model grows when it loads another, `kept` or `decoded`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PEAK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    requests, answers = process.stdin, process.stdout
    assert requests is not None and answers is not None

    def ask(folder: Path, tiny: Path, how: str) -> int:
        print(json.dumps([str(folder), str(tiny), how]), file=requests, flush=True)
        return int(answers.readline())

    with process:
        yield ask


@pytest.mark.parametrize("encoding", ["bf16", "fp8", "nvfp4", "int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_is_the_loaded_size_and_one_shard(
    layout: Layout, encoding: Encoding, tmp_path: Path, tiny_mistral4: Path, measure: Measure
) -> None:
    folder = write_tiny("mistral-small-4", tmp_path / "m", 1, encoding=encoding, layout=layout, shards=4, **BIG)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    kept, decoded = (measure(folder, tiny_mistral4, how) for how in ("kept", "decoded"))
    assert kept < sum(sizes) + max(sizes) + SLACK_BYTES
    assert decoded < BF16_BYTES + max(sizes) + SLACK_BYTES
    # The measure sees the weights at all.
    assert kept > sum(sizes)
    assert decoded > BF16_BYTES

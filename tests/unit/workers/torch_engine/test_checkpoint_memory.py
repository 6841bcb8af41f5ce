"""How much memory loading takes, for every format and layout, measured as the peak of a process of its own."""

from __future__ import annotations

import subprocess
import sys
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

PEAK = """
import re, sys, torch
from pathlib import Path
from workers.engines.torch.config import read_config
from workers.engines.torch.registry import load_decoder
from tests.support.torch_models import a_runner
a_runner(Path(sys.argv[2])).close()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before, folder = peak(), Path(sys.argv[1])
config, cpu = read_config(folder), torch.device("cpu")
decoder = load_decoder(config, folder, torch.bfloat16, cpu, compressed=sys.argv[3] == "kept")
print(peak() - before)
"""


@pytest.mark.parametrize("encoding", ["bf16", "fp8", "nvfp4", "int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_is_the_loaded_size_and_one_shard(layout: Layout, encoding: Encoding, tmp_path: Path, tiny_mistral4: Path) -> None:
    folder = write_tiny("mistral-small-4", tmp_path / "m", 1, encoding=encoding, layout=layout, shards=4, **BIG)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    children = [
        subprocess.Popen([sys.executable, "-c", PEAK, str(folder), str(tiny_mistral4), how], stdout=subprocess.PIPE)
        for how in ("kept", "decoded")
    ]
    kept, decoded = (int(child.communicate(timeout=60)[0]) for child in children)
    assert kept < sum(sizes) + max(sizes) + SLACK_BYTES
    assert decoded < BF16_BYTES + max(sizes) + SLACK_BYTES
    # The measure sees the weights at all.
    assert kept > sum(sizes)
    assert decoded > BF16_BYTES

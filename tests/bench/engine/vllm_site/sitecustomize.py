"""For vLLM's Python and the processes that it starts: packages that text models do not need count as not installed.

Their builds on PyPI are for CUDA and do not load beside the CPU build of torch.
"""

from __future__ import annotations

import sys

for _name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules[_name] = None  # type: ignore[assignment]

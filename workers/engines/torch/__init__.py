"""The torch engine: real weights, paged KV, chunked prefill and batched decode on a CPU or a GPU.

`build.create_engine` is the way in. torch is imported inside this package only.
"""

from __future__ import annotations

from configs.env import set_for_libraries

# Threads that spin while they wait for work slow each other down several times over when two engines share the cores; ones
# that never spin cost a prompt a tenth of its speed in wake-ups between operations. These spin for some tens of microseconds.
# OpenMP reads this when torch is first imported.
set_for_libraries({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"})

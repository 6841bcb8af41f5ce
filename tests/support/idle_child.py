"""A child that does nothing until SIGTERM: `python -m tests.support.idle_child SPEC.json`.

The model's source in the spec says how it ends: `exit:N` at once with code N, `deaf` never on SIGTERM, anything else with
code 0 on SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

source = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["model"]["source"]
print(f"child {os.getpid()} says {source}", flush=True)
if source.startswith("exit:"):
    raise SystemExit(int(source.removeprefix("exit:")))
signal.signal(signal.SIGTERM, signal.SIG_IGN if source == "deaf" else lambda *_: os._exit(0))
while True:
    signal.pause()

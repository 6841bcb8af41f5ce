"""Runs a module as a child that cannot outlive its parent: `python -m orchestrator.runtime.child PARENT_PID MODULE [ARG ...]`.

The kernel kills this process when the thread that started it ends (PR_SET_PDEATHSIG), even while it is frozen or its
interpreter hangs, which no watching thread could do. Where there is no such call the module is run without it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """The command line."""
    parent_pid, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent_pid):
        raise SystemExit(f"{module}: the parent {parent_pid} ended before its child began")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

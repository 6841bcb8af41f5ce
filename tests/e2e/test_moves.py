"""`autan migrate`, `drain` and `undrain` as a person runs them, on worker processes that ask for signed capabilities."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.cluster import expected_output, oracle_config, random_prompt
from tests.support.command import Autan
from tests.support.processes import wait_until

pytestmark = pytest.mark.timeout(120)

TOKENS = 1000
CONFIG = oracle_config("moves", decode=2, engine={"oracle": {"decode_step_s": 0.02}})


def start(autan: Autan, name: str, prompt: list[int]) -> subprocess.Popen[str]:
    ids = ",".join(map(str, prompt))
    options = ["--max-tokens", str(TOKENS), "--temperature", "0", "--request-id", name, "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli.main", "generate", "--token-ids", ids, *options],
        env=autan.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def place(autan: Autan, name: str) -> str:
    """Where a request decodes; empty until it does."""
    found = [one for one in autan.json("requests") if one["request_id"] == name and one["state"] == "DECODING"]
    return found[0]["decode_instance"] if found else ""


def other(instance: str) -> str:
    return {"decode-0": "decode-1", "decode-1": "decode-0"}[instance]


def test_a_request_is_moved_and_an_instance_drained(autan: Autan) -> None:
    autan.json("up", autan.file("moves", CONFIG.model_dump(mode="json", exclude_defaults=True)), "--detach")
    prompt = random_prompt(3, 200)
    running = start(autan, "mover", prompt)
    try:
        wait_until(lambda: bool(place(autan, "mover")), "it decodes", 30.0)
        first = place(autan, "mover")
        assert autan("migrate", "nobody", "--to", first).returncode == 2
        assert autan("migrate", "mover", "--to", "nowhere").returncode != 0
        begun = autan.json("migrate", "mover", "--to", other(first))
        assert begun == {"request_id": "mover", "target": other(first), "epoch": 2}
        wait_until(lambda: place(autan, "mover") == other(first), "it has moved", 20.0)
        assert autan.json("drain", other(first)) == {"instance_id": other(first), "draining": True, "moving": ["mover"]}
        wait_until(lambda: place(autan, "mover") == first, "the drain moved it back", 20.0)
        assert autan.json("undrain", other(first))["moving"] == []
        out, error = running.communicate(timeout=60)
        assert running.returncode == 0, error
        answer = json.loads(out)
        assert answer["token_ids"] == expected_output(CONFIG, prompt, TOKENS)
        assert answer["timeline"]["migrations"] == 2
        assert all(not one["findings"] for one in autan.json("kv", "verify")["instances"])
        assert all(one["kv_blocks"]["used"] == 0 for one in autan.json("status")["instances"])
    finally:
        running.kill()

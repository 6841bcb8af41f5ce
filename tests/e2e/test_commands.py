"""`autan` as a person runs it: real processes, exit codes, JSON."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.client import Client
from orchestrator.runtime.run_dir import read_run_files
from tests.support.cluster import expected_output, oracle_config, random_prompt
from tests.support.command import Autan, cluster_values
from tests.support.processes import process_state, wait_until

pytestmark = pytest.mark.timeout(120)


def test_a_cluster_from_up_to_down(autan: Autan) -> None:
    file = autan.file("one", cluster_values("one"))
    up = autan.json("up", file, "--detach")
    assert up["cluster"] == "one"
    prompt = random_prompt(1, 200)
    ids = ",".join(map(str, prompt))
    done = autan.json("generate", "--token-ids", ids, "--max-tokens", "12", "--temperature", "0", "--request-id", "first")
    assert done["token_ids"] == expected_output(oracle_config("one"), prompt, 12)
    assert done["request_id"] == "first" and done["finish_reason"] == "length" and done["usage"]["prompt_tokens"] == 200
    assert (done["prefill_instance"], done["decode_instance"]) == ("prefill-0", "decode-0")
    assert done["timeline"]["handoff_blocks"] == 4 and done["timeline"]["ttft_s"] > 0
    streamed = autan("generate", "-", "--max-tokens", "7", stdin="hello there")
    assert streamed.returncode == 0 and len(streamed.stdout) == 8, "seven letters and a line break"
    status = autan.json("status")
    assert {one["instance_id"]: (one["role"], one["state"], one["epoch"]) for one in status["instances"]} == {
        "prefill-0": ("prefill", "READY", 1),
        "decode-0": ("decode", "READY", 1),
    }
    for one in status["instances"]:
        assert one["kv_blocks"]["used"] == 0 and one["kv_blocks"]["free"] > 0
    assert status["requests"]["finished"] == 2
    assert autan.json("requests") == []
    assert "prefill-0" in autan("status").stdout
    again = autan("up", file, "--detach")
    assert again.returncode == 2 and "runs already" in again.stderr
    assert autan.json("down") == {"cluster": "one", "stopped": True}
    gone = autan("status")
    assert gone.returncode == 3 and "autan up" in gone.stderr


def test_interrupting_the_foreground_drains_and_leaves_no_process(autan: Autan) -> None:
    file = autan.file("front", cluster_values("front"))
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli.main", "up", file], env=autan.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: bool(read_run_files(autan.home)), "the cluster is up", 30.0)
        workers = [child.pid for child in _descendants(process.pid)]
        assert len(workers) >= 3, "a store and two workers"
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "draining" in log and "stopped" in log
        wait_until(lambda: all(process_state(pid) in ("", "Z") for pid in workers), "every process is gone", 10.0)
        assert not read_run_files(autan.home)
    finally:
        process.kill()


def test_a_killed_orchestrator_leaves_no_process(autan: Autan) -> None:
    up = autan.json("up", autan.file("killed", cluster_values("killed")), "--detach")
    workers = [child.pid for child in _descendants(up["pid"])]
    os.kill(up["pid"], signal.SIGKILL)
    wait_until(lambda: all(process_state(pid) in ("", "Z") for pid in workers), "every process is gone", 10.0)
    assert autan("status").returncode == 3


def _descendants(pid: int) -> list[Any]:
    import psutil

    return psutil.Process(pid).children(recursive=True)


@pytest.fixture(scope="module")
def served() -> Iterator[Autan]:
    """A running cluster for requests that must not harm it."""
    with tempfile.TemporaryDirectory(prefix="autan-") as home:
        command = Autan(Path(home))
        command.json("up", command.file("served", cluster_values("served")), "--detach")
        try:
            yield command
        finally:
            command.down_all()


BAD_REQUESTS = [
    (["generate", ""], 2, "INVALID_ARGUMENT"),
    (["generate", "--token-ids", "5,999999"], 2, "INVALID_ARGUMENT"),
    (["generate", "x" * 300, "--max-tokens", "262144"], 2, "OUT_OF_RANGE"),
    (["generate", "x", "--max-tokens", "0"], 2, "INVALID_ARGUMENT"),
    (["generate", "x", "--max-tokens", "-1"], 2, "INVALID_ARGUMENT"),
    (["generate", "x", "--max-tokens", str(2**40)], 2, None),
    (["generate", "x", "--temperature", "nan"], 2, "INVALID_ARGUMENT"),
    (["generate", "x", "--temperature", "-3"], 2, "INVALID_ARGUMENT"),
    (["generate", "x", "--model", "no-such-model"], 2, "NOT_FOUND"),
    (["generate", "x", "--request-id", "a{b}:c"], 2, "INVALID_ARGUMENT"),
    (["generate", "--token-ids", "1,two"], 2, "INVALID_ARGUMENT"),
    (["generate", "--token-ids", "-1"], 2, None),
    (["generate"], 2, "INVALID_ARGUMENT"),
    (["cancel", "nobody-knows-it"], 2, "NOT_FOUND"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "code"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_refused_with_a_sentence(
    served: Autan, arguments: list[str], exit_code: int, code: str | None
) -> None:
    done = served(*arguments, "--json")
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip()) > 20
    if code is not None:
        assert json.loads(done.stdout)["error"]["code"] == code
    with Client(read_run_files(served.home)[0].endpoint) as client:
        assert len(client.complete("still there", max_tokens=3).token_ids) == 3
        # What instances tell of themselves in the status is as old as their last heartbeat.
        wait_until(
            lambda: all(one.stats.used_blocks == 0 for one in client.status().instances),
            "no block is in use after every request has ended", 15.0,
        )  # fmt: skip


def test_the_books_and_the_doctor_as_commands(served: Autan) -> None:
    listed = served.json("kv", "ls")
    assert [one["instance_id"] for one in listed["instances"]] == ["decode-0", "prefill-0"] and not listed["unanswered"]
    verified = served.json("kv", "verify", "decode-0")
    assert [(one["instance_id"], one["findings"]) for one in verified["instances"]] == [("decode-0", [])]
    assert [one["applied"] for one in served.json("kv", "gc")["instances"]] == [False, False]
    assert served("kv", "gc", "--apply").stdout.strip() == "nothing to give back"
    report = served.json("doctor")
    assert report["healthy"] and {(row["from"], row["instance_id"]) for row in report["matrix"]} >= {
        ("prefill-0", "decode-0"),
        ("ingress", "decode-0"),
        ("prefill-0", ""),
    }
    assert served("doctor").returncode == 0 and "BROKEN" not in served("doctor").stdout
    assert served("kv", "ls", "nobody").returncode == 2


def test_bad_files_exit_with_2_and_name_the_place(autan: Autan) -> None:
    unknown = cluster_values("bad")
    unknown["pools"][0]["engine"]["num_blokcs"] = 3
    done = autan("up", autan.file("bad", unknown))
    assert done.returncode == 2
    assert "pools[0].engine.num_blokcs" in done.stderr and "bad.yaml:" in done.stderr
    evil = autan.home / "evil.yaml"
    evil.write_text("version: 1\nname: !!python/object/apply:os.system ['true']\n")
    assert autan("config", "check", str(evil)).returncode == 2
    assert autan("config", "check", str(autan.home / "absent.yaml")).returncode == 2
    shown = autan("config", "show", "laptop")
    assert shown.returncode == 0 and yaml.safe_load(shown.stdout)["timing"]["lease_s"] == 3.0


def test_a_port_in_use_is_named(autan: Autan) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = autan("up", autan.file("port", cluster_values("port", ingress={"address": address})))
    assert done.returncode == 2
    assert address in done.stderr and "in use" in done.stderr


def test_a_store_that_is_not_there_is_named(autan: Autan) -> None:
    done = autan("up", autan.file("nostore", cluster_values("nostore", store={"url": "redis://127.0.0.1:1/0"})))
    assert done.returncode == 3
    assert "127.0.0.1:1" in done.stderr


def test_a_missing_model_is_named(autan: Autan) -> None:
    done = autan("up", "laptop", "--model", str(autan.home / "no-model"))
    assert done.returncode == 2
    assert "no-model" in done.stderr


def test_a_broken_checkpoint_is_named_and_the_cluster_stops(autan: Autan) -> None:
    folder = autan.home / "half"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    done = autan("up", "laptop", "--model", str(folder))
    assert done.returncode == 2
    assert "config.json" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_with_the_oracle_on_ray(autan: Autan) -> None:
    done = autan("demo", "oracle", "--json", timeout_s=100.0)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal_to_one_engine"] is True
    assert len(result["requests"]) == 4
    assert all(one["handoff_blocks"] > 0 for one in result["requests"])
    assert result["requests"][3]["prompt_tokens"] > 1500

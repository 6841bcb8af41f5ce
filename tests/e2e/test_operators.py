"""What operators see of a whole cluster: the books of KV blocks and the doctor's report."""

from __future__ import annotations

import os
import signal

import pytest

from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from protos.contract.errors import InvalidRequest
from protos.wire import admin
from tests.support.cluster import oracle_config, pid_of, random_prompt, run, running, watch

pytestmark = pytest.mark.timeout(90)


def broken(reply: admin.DiagnoseReply) -> list[tuple[str, str]]:
    return [(one.name, one.subject) for one in reply.checks if one.health == admin.HEALTH_BROKEN]


async def stop_and_look(cluster: LocalCluster, client: AsyncClient) -> None:
    """A worker that stands answers nobody, and everybody says so."""
    pid = await pid_of(cluster, "decode-0")
    os.kill(pid, signal.SIGSTOP)
    try:
        reply = await client.diagnose()
        assert [one.instance_id for one in reply.unanswered] == ["decode-0"]
        assert ("worker", "decode-0") in broken(reply) and ("path", "prefill-0 -> decode-0") in broken(reply)
        books = await client.list_kv()
        assert [one.instance_id for one in books.books] == ["prefill-0"]
        assert [one.instance_id for one in books.unanswered] == ["decode-0"]
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_books_and_the_doctor_of_a_cluster() -> None:
    async def body() -> None:
        async with running(oracle_config("ops")) as (cluster, client):
            await watch(client, random_prompt(1, 200), 8)
            reply = await client.diagnose()
            assert broken(reply) == [], reply.checks
            paths = {(r.instance_id, p.instance_id): p for r in reply.workers for p in r.peers if p.instance_id}
            assert set(paths) == {("prefill-0", "decode-0"), ("decode-0", "prefill-0")}
            assert all(p.reachable and p.is_expected and not p.differing and p.shared_memory for p in paths.values())
            audits = (await client.verify_kv()).audits
            assert [(a.books.instance_id, len(a.findings), a.books.leaked_blocks) for a in audits] == [
                ("decode-0", 0, 0),
                ("prefill-0", 0, 0),
            ]
            assert all(not one.returns for one in (await client.collect_kv(apply=True)).collections)
            assert [one.instance_id for one in (await client.list_kv(["prefill-0"])).books] == ["prefill-0"]
            with pytest.raises(InvalidRequest, match="decode-0, prefill-0"):
                await client.list_kv(["nobody"])
            await stop_and_look(cluster, client)

    run(body())

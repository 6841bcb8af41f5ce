"""`autan demo`: a disaggregated cluster on this machine answers real prompts, proves itself, and stops."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Annotated, Any

import typer

from configs.env import child_environment
from configs.load import load_cluster
from configs.schema.cluster import ClusterConfig
from orchestrator.cli.demo_prompts import demo_prompts
from orchestrator.cli.demo_report import Answer, answer_json, print_timelines, stream_answer
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.cli.output import print_json, stderr, stdout
from orchestrator.cli.up import configure_logging, make_launcher
from orchestrator.client import Accepted, AsyncClient, Delta
from orchestrator.runtime.run_dir import RunDir
from protos.contract.errors import Cancelled, InternalError, ModelError

SOLO_MODULE = "workers.service.solo"
_FREE_WITHIN_S = 10.0
_CANCEL_AFTER_TOKENS = 5


def demo(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Cluster file or preset name.")] = "laptop",
    max_tokens: Annotated[int, typer.Option(min=8, max=4096, help="Length of each answer.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at the end; everything else goes to stderr.")] = False,
) -> None:
    """Start a cluster, answer prompts through a real hand-off, show the timeline, compare with one engine, cancel, stop."""
    if as_json:
        stdout.file = sys.stderr
    config = _as_demo(load_cluster(file))
    try:
        result = asyncio.run(_run(config, max_tokens))
    except ModelError as error:
        if config.model.source != "demo":
            raise
        stderr.print(
            f"no demo model: {error.message}\nGoing on with the oracle, which computes its answers by arithmetic.", markup=False
        )
        result = asyncio.run(_run(_as_demo(load_cluster("oracle")), max_tokens))
    if as_json:
        print_json(result)


def _as_demo(config: ClusterConfig) -> ClusterConfig:
    """A name and a port of its own, so that it runs beside another cluster."""
    values = config.model_dump()
    return ClusterConfig.model_validate({**values, "name": "demo", "ingress": {**values["ingress"], "address": "127.0.0.1:0"}})


async def _run(config: ClusterConfig, max_tokens: int) -> dict[str, Any]:
    started_s = time.monotonic()

    def progress(text: str) -> None:
        stderr.print(f"[{time.monotonic() - started_s:5.1f} s] {text}", markup=False)

    run_dir = RunDir(config.name)
    run_dir.prepare()
    configure_logging(run_dir.logs / "orchestrator.log")
    async with LocalCluster(config, make_launcher, progress=progress) as cluster:
        async with AsyncClient(cluster.endpoint) as client:
            progress(f"cluster is up: {', '.join(sorted(cluster.fleet.groups))}; four prompts at once, greedy")
            answers, prompts = await _answer(client, max_tokens)
            stdout.print()
            print_timelines(answers)
            progress("the same prompts on one engine without hand-off")
            await _prove_equality(cluster, client, answers, prompts, max_tokens)
            freed_s = await _cancel_one(client)
        progress("stopping")
    total_s = time.monotonic() - started_s
    stdout.print(f"done in {total_s:.1f} s")
    return {
        "model": config.model.name,
        "requests": [answer_json(answer) for answer in answers],
        "equal_to_one_engine": True,
        "blocks_free_after_cancel_s": freed_s,
        "total_s": total_s,
    }


async def _answer(client: AsyncClient, max_tokens: int) -> tuple[list[Answer], list[list[int]]]:
    """The answers, and the token ids of the prompts for the comparison."""
    chats = [(prompt, [{"role": "user", "content": prompt.text}]) for prompt in demo_prompts(max_tokens)]
    prompts = [await client.tokenize(messages=messages) for _, messages in chats]
    answers = await asyncio.gather(
        *(
            stream_answer(
                client, prompt.label, {"messages": messages, "max_tokens": prompt.max_tokens, "temperature": 0.0}
            )
            for prompt, messages in chats
        )
    )  # fmt: skip
    return list(answers), prompts


async def _prove_equality(
    cluster: LocalCluster, client: AsyncClient, answers: list[Answer], prompts: list[list[int]], max_tokens: int
) -> None:
    """Raises InternalError, naming request and position, when one engine alone gives another token."""
    alone = await _solo(cluster, prompts, max_tokens)
    for answer, expected in zip(answers, alone, strict=True):
        if answer.token_ids != expected:
            pairs = zip(answer.token_ids, expected, strict=False)
            at = next(
                (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(expected), len(answer.token_ids))
            )
            raise InternalError(f"{answer.label}: token {at} differs from the one that a single engine gives")
    tokens = sum(map(len, alone))
    stdout.print(f"equal: all {tokens} tokens of {len(answers)} answers are those of one engine without hand-off")


async def _solo(cluster: LocalCluster, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    config = cluster.config
    decode = next(pool for pool in config.pools if pool.role != "prefill")
    job = {
        "model": config.model.model_dump(),
        "model_dir": str(cluster.model_dir) if cluster.model_dir else None,
        "engine": {**decode.engine.model_dump(), "threads": None},
        "requests": [
            {"prompt": prompt, "max_tokens": max_tokens, "stop_token_ids": list(cluster.card.eos_token_ids)}
            for prompt in prompts
        ],
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", SOLO_MODULE,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=child_environment(),
    )  # fmt: skip
    out, log = await process.communicate(json.dumps(job).encode())
    if process.returncode:
        raise InternalError(f"the single engine ended with code {process.returncode}: {log.decode(errors='replace')[-1000:]}")
    outputs: list[list[int]] = json.loads(out)["outputs"]
    return outputs


async def _cancel_one(client: AsyncClient) -> float:
    """Cancels a request in mid-decode; returns the seconds until no KV block is in use. Raises InternalError if some stay."""
    request_id = ""
    seen = 0
    cancelled_s = 0.0
    try:
        async for event in client.generate(
            messages=[{"role": "user", "content": "Tell me a long story."}], max_tokens=1000, ignore_eos=True
        ):
            match event:
                case Accepted():
                    request_id = event.request_id
                case Delta():
                    seen += len(event.token_ids)
                    if seen >= _CANCEL_AFTER_TOKENS and not cancelled_s:
                        await client.cancel(request_id)
                        cancelled_s = time.monotonic()
                case _:
                    raise InternalError(f"{request_id} finished although it was cancelled")
    except Cancelled:
        pass
    while time.monotonic() < cancelled_s + _FREE_WITHIN_S:
        status = await client.status()
        used = sum(one.stats.used_blocks + one.stats.leaked_blocks for one in status.instances)
        if used == 0 and status.running == 0:
            freed_s = time.monotonic() - cancelled_s
            stdout.print(f"cancelled: after {seen} tokens; no KV block in use on any instance {freed_s:.1f} s later")
            return freed_s
        await asyncio.sleep(0.05)
    raise InternalError(f"KV blocks are still in use {_FREE_WITHIN_S:.0f} s after the cancel")

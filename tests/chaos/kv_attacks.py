"""Attacks on the KV plane of a running cluster, case by case, while honest requests go on beside them.

    python -m tests.chaos.kv_attacks [--tries N] [--seed N] [--case TEXT ...] [--in-flight N] [--json]

A real orchestrator, a real prefill and a real decode worker process of the oracle engine, and between the two workers an
attacker who sees and changes everything that they say (kv_attack_wire). For each case of the catalogue (kv_attack_cases): N
changed messages; the tokens of every request compared with the oracle's closed form; then no block in use, no finding in the
books of either worker, both processes alive. Exit code 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema.cluster import ClusterConfig
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient, Delta, Finished
from protos.contract.capability import KeyFile
from protos.contract.errors import AutanError
from protos.rpc import open_channel, worker_pb2_grpc
from protos.wire import audit, worker
from tests.chaos.kv_attack_cases import catalogue
from tests.chaos.kv_attack_messages import Case, Stage
from tests.chaos.kv_attack_wire import Attack, AttackWire
from tests.support.cluster import no_block_left, oracle_config, random_prompt, running
from tests.support.kv_wire import reroute
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.build import oracle_model
from workers.engines.oracle.reference import expected_tokens_fast

TENANTS = ("acme", "rival")
OPERATOR = "operator"
BLOCK_TOKENS, PROMPT_TOKENS, MAX_TOKENS = 16, 77, 6
PREFIXES, PREFIX_TOKENS = 4, 2 * BLOCK_TOKENS
TRIES_OF_ONE_REQUEST = 10
EXPLAINED = {"FINGERPRINT_MISMATCH"}  # ends its request: the same pair of workers would only fail again
WAIT_S = 60.0
SETTLE_S = 20.0
ENGINE = {"block_tokens": BLOCK_TOKENS, "num_blocks": 2048, "max_batch_tokens": 2048, "max_running": 256}
TIMING = {"heartbeat_s": 0.5, "lease_s": 2.5, "kv_lease_s": 6.0, "progress_timeout_s": 10.0}
# Windows of 16 KiB: three hand-offs fit, a grant comes after 4. All bytes come by the one stream that the attacker changes.
NETWORK = {"frame_bytes": 1024, "credit_bytes": 65_536, "streams": 1, "shared_memory": False}
SCHEDULING = {"max_attempts": 10}


@dataclass(slots=True)
class Row:
    """What came of one case."""

    case: str
    source: str
    tries: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    passed: list[str] = field(default_factory=list)
    requests: int = 0
    bystanders: int = 0
    wrong_tokens: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    victim_errors: list[str] = field(default_factory=list)  # that the attack does not explain
    bystander_errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Everything that must not be; empty for a case that held."""
        return [*self.passed, *self.wrong_tokens, *self.victim_errors, *self.bystander_errors, *self.leaks, *self.deaths]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "case": self.case, "source": self.source, "tries": self.tries, "outcomes": dict(self.outcomes),
            "passed": self.passed, "requests": self.requests, "bystanders": self.bystanders,
            "wrong_tokens": self.wrong_tokens, "errors": dict(self.errors), "victim_errors": self.victim_errors,
            "bystander_errors": self.bystander_errors,
            "leaks": self.leaks, "deaths": self.deaths, "seconds": round(self.seconds, 2),
        }  # fmt: skip


def attack_config(name: str, keys_file: Path) -> ClusterConfig:
    """One prefill and one decode worker, small blocks, two tenants and an operator."""
    return oracle_config(
        name, engine=ENGINE, timing=TIMING, network=NETWORK, scheduling=SCHEDULING,
        ingress={"address": "127.0.0.1:0", "keys_file": str(keys_file)},
    )  # fmt: skip


def write_keys(path: Path) -> None:
    """A client key for each tenant and one for the operator; a key is as its tenant is called."""
    roles = {**dict.fromkeys(TENANTS, "client"), OPERATOR: "admin"}
    entries = [
        {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": name, "role": role}
        for name, role in roles.items()
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")
    path.chmod(0o600)


class AttackRun:
    """One cluster with an attacker in it."""

    def __init__(self, cluster: LocalCluster, wire: AttackWire, clients: dict[str, AsyncClient], seed: int) -> None:
        self._cluster = cluster
        self.wire = wire
        self._clients = clients
        self._seed = seed
        self._serial = 0
        self._model = oracle_model(cluster.config.model)
        self._pids: dict[str, int] = {}
        self.addresses: dict[str, str] = {}

    async def prime(self) -> None:
        """The attacker sees a few hand-offs of each tenant before the first attack."""
        self._pids = await self._running()
        seen = next(case for case in catalogue() if case.stage is Stage.REPLAY)
        row = Row("", "")
        await asyncio.gather(*(self._victim(row, seen, 0, tenant) for tenant in TENANTS for _ in range(4)))
        assert not row.errors and not row.faults, row

    async def attack(self, case: Case, tries: int, in_flight: int) -> Row:
        """`tries` attacks that took effect, several on one request; for every few of them a request that nobody attacks."""
        started_s, row, begun = time.monotonic(), Row(case.name, case.source), 0
        alone = case.stage in (Stage.OPEN_REPLY, Stage.PUSH_REPLY) or (case.stage is Stage.CLOSE and case.may_pass)
        most = 1 if alone else TRIES_OF_ONE_REQUEST

        async def lane() -> None:
            nonlocal begun
            unaccompanied = 0
            while begun < tries:
                count = min(most, tries - begun)
                begun += count
                tenant = TENANTS[row.requests % len(TENANTS)]
                attacked = self._victim(row, case, count, tenant)
                unaccompanied -= count
                if unaccompanied < 0:
                    unaccompanied = TRIES_OF_ONE_REQUEST
                    done, _ = await asyncio.gather(attacked, self._bystander(row, tenant))
                else:
                    done = await attacked
                begun -= count - done
                if self.wire.broken:
                    raise self.wire.broken[-1]
                assert row.requests < 20 + 10 * tries, f"{case.name}: the attack does not come about: {row}"

        lanes = min(in_flight, -(-tries // most))
        await asyncio.gather(*(lane() for _ in range(lanes)))
        row.seconds = time.monotonic() - started_s
        return row

    async def audit(self, rows: Sequence[Row]) -> None:
        """Waits until nothing is in use and looks at the books of both workers; what is wrong goes into every row."""
        found = []
        try:
            await no_block_left(self._clients[OPERATOR], SETTLE_S)
        except AssertionError as error:
            found.append(str(error))
        for name, address in self.addresses.items():
            books = await verified(address)
            found += [f"{name}: {one.kind} {one.request_id} {one.epoch}: {one.detail}" for one in books.findings]
            if books.books.opened != books.books.released:
                found.append(f"{name}: {books.books.opened} opened, {books.books.released} released")
        running_now = await self._running()
        dead = [f"{name}: process {pid} is gone" for name, pid in self._pids.items() if running_now.get(name) != pid]
        for row in rows:
            row.leaks += found
            row.deaths += dead
        if self.wire.broken:
            raise self.wire.broken[0]

    async def _victim(self, row: Row, case: Case, tries: int, tenant: str) -> int:
        self._serial += 1
        row.requests += 1
        rng = random.Random(f"{self._seed}/{row.case}/{case.name}/{row.requests}")
        attack = Attack(case, tenant, tries, rng)
        request_id = f"a{self._serial}"
        self.wire.attacks[request_id] = attack
        try:
            await self._request(row, request_id, rng, tenant)
            if case.stage is Stage.REPLAY and tries:
                await self.wire.replay(attack)
        except AutanError as error:
            row.errors[error.reason] += 1
            if error.reason not in EXPLAINED:
                row.victim_errors.append(f"{request_id}: {error.reason}: {error}")
        finally:
            del self.wire.attacks[request_id]
        row.tries += attack.done
        row.outcomes += attack.outcomes
        row.passed += attack.passed
        return attack.done

    async def _bystander(self, row: Row, tenant: str) -> None:
        self._serial += 1
        request_id = f"b{self._serial}"
        row.bystanders += 1
        rng = random.Random(f"{self._seed}/{row.case}/beside/{row.bystanders}")
        try:
            await self._request(row, request_id, rng, tenant)
        except AutanError as error:
            row.bystander_errors.append(f"{request_id}: {error.reason}: {error}")

    async def _request(self, row: Row, request_id: str, rng: random.Random, tenant: str) -> None:
        """One request of a client, its tokens judged. Raises what it ended with."""
        prefix = random_prompt(rng.randrange(PREFIXES), PREFIX_TOKENS) if rng.random() < 0.4 else []
        prompt = prefix + random_prompt(rng.randrange(1 << 30), PROMPT_TOKENS - len(prefix))
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(1 << 32))
        expected = expected_tokens_fast(self._model, prompt, sampling)
        tokens: list[int] = []
        finished = False
        try:
            async with asyncio.timeout(WAIT_S):
                async for event in self._clients[tenant].generate(
                    token_ids=prompt, max_tokens=MAX_TOKENS, temperature=sampling.temperature, seed=sampling.seed,
                    request_id=request_id,
                ):  # fmt: skip
                    if isinstance(event, Delta):
                        tokens += event.token_ids
                    finished |= isinstance(event, Finished)
        except TimeoutError:
            row.wrong_tokens.append(f"{request_id}: no end in {WAIT_S} s")
        finally:
            if tokens != expected[: len(tokens)] or (finished and len(tokens) != len(expected)):
                row.wrong_tokens.append(f"{request_id}: {tokens}, not {expected}")

    async def _running(self) -> dict[str, int]:
        return {name: ranks[0].pid for name, ranks in (await self._cluster.launcher.alive()).items()}


async def verified(address: str) -> audit.KvAudit:
    """The books of the worker at an address against its engine."""
    async with open_channel(address) as channel:
        stub: Any = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
        reply: audit.KvAudit = await stub.VerifyKv(worker.WorkerVerifyKvRequest(), timeout=10.0)
        return reply


@asynccontextmanager
async def attacked_cluster(seed: int) -> AsyncIterator[AttackRun]:
    """A cluster whose hand-offs all go through the attacker."""
    with tempfile.TemporaryDirectory(prefix="autan-keys-") as folder:
        keys_file = Path(folder) / "keys.json"
        write_keys(keys_file)
        config = attack_config("attacks", keys_file)
        async with running(config, api_key=OPERATOR) as (cluster, operator):
            records = {one.instance_id: one.addr for one in (await cluster.store.view()).instances}
            signing = KeyFile(cluster.run_dir.handoff_keys)
            model = oracle_model(config.model)
            wire = AttackWire(records["decode-0"], lambda: signing.keys, model.layout(BLOCK_TOKENS).block_bytes)
            await wire.start()
            clients = {tenant: AsyncClient(cluster.endpoint, api_key=tenant) for tenant in TENANTS}
            run = AttackRun(cluster, wire, {**clients, OPERATOR: operator}, seed)
            try:
                reroute(cluster.store_url, config.name, "decode-0", wire.address)
                run.addresses = records
                await run.prime()
                yield run
            finally:
                await asyncio.gather(*(client.close() for client in clients.values()))
                await wire.stop()


async def attack_each(cases: Sequence[Case], tries: int, seed: int, in_flight: int, tell: Any = None) -> list[Row]:
    """One case after the other, with an audit after each: what is wrong is known to come from that case."""
    rows = []
    async with attacked_cluster(seed) as run:
        for case in cases:
            row = await run.attack(case, tries, in_flight)
            await run.audit([row])
            rows.append(row)
            if tell is not None:
                tell(row)
    return rows


async def attack_all(cases: Sequence[Case], tries: int, seed: int) -> list[Row]:
    """All cases at once, with one audit at the end."""
    async with attacked_cluster(seed) as run:
        rows = await asyncio.gather(*(run.attack(case, tries, tries) for case in cases))
        await run.audit(rows)
    return rows


def line(row: Row) -> str:
    """One row of the table."""
    outcomes = ", ".join(f"{name} {count}" for name, count in row.outcomes.most_common(4))
    errors = ", ".join(f"{name} {count}" for name, count in row.errors.items()) or "-"
    return (
        f"{row.source:<16} {row.case:<32} {row.tries:>6} {len(row.passed):>6} {len(row.wrong_tokens):>5} {len(row.leaks):>5} "
        f"{len(row.deaths):>6} {row.bystanders:>10} {row.seconds:>6.1f}  {outcomes}; errors: {errors}"
    )


HEADER = (
    f"{'source':<16} {'case':<32} {'tries':>6} {'passed':>6} {'wrong':>5} {'leaks':>5} "
    f"{'deaths':>6} {'bystanders':>10} {'s':>6}  outcomes"
)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kv_attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", default=[], help="only cases with this in their name or source")
    parser.add_argument("--in-flight", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [c for c in catalogue() if not options.case or any(text in f"{c.source} {c.name}" for text in options.case)]
    if not chosen:
        parser.error(f"no case has {' or '.join(options.case)} in its name")
    tell = None if options.json else lambda row: print(line(row), flush=True)
    if tell is not None:
        print(HEADER)
    rows = asyncio.run(attack_each(chosen, options.tries, options.seed, options.in_flight, tell))
    faults = [f"{row.case}: {fault}" for row in rows for fault in row.faults]
    if options.json:
        print(json.dumps({"seed": options.seed, "cases": [row.as_json() for row in rows], "faults": faults}, indent=2))
    else:
        tries, beside = (sum(counts) for counts in zip(*((row.tries, row.bystanders) for row in rows), strict=True))
        print(f"{len(rows)} cases, {tries} tries, {beside} requests beside them, {len(faults)} faults")
        print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Peers without a certificate of the CA, on every RPC of what `autan up` starts: refused, and the log says why."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.certificates import TlsFiles
from protos.contract.identity import PeerRole, roles_of
from protos.rpc import Dialer
from tests.support.certificates import Lab, Showing, a_lab, forged, identity
from tests.support.command import Autan, cluster_values
from tests.support.rpc_methods import LISTENERS, Method, every_method, outcome

CLUSTER = "shut"


def listening(autan: Autan) -> dict[str, str]:
    """The address of each listener, as the processes logged or registered them."""
    log = (autan.home / "run" / CLUSTER / "logs" / "orchestrator.log").read_text()
    clients, sink = re.findall(r"clients at (\S+), workers at ([^\s\"]+)", log)[0]
    (decode,) = [one["address"] for one in autan.json("status")["instances"] if one["instance_id"] == "decode-0"]
    return {"worker": decode, "orchestrator": clients, "sink": sink}


def bad_files(lab: Lab, stranger: Lab, tmp_path: Path) -> dict[str, tuple[dict[PeerRole, TlsFiles | None], str]]:
    """What each bad peer shows, by the role that it claims, and what the log must say."""
    ca = lab.ca.path
    found: dict[str, tuple[dict[PeerRole, TlsFiles | None], str]] = {
        "no TLS at all": (dict.fromkeys(PeerRole), "WRONG_VERSION_NUMBER"),
        "no certificate": (dict.fromkeys(PeerRole, TlsFiles(ca)), "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        "another CA": ({role: replace(stranger.files(role), ca=ca) for role in PeerRole}, "unable to get local issuer"),
    }
    kinds: dict[str, tuple[dict[str, Any], str]] = {
        "expired": ({"issuer": lab.ca, "valid_from_days": -9, "valid_to_days": -1}, "certificate has expired"),
        "early": ({"issuer": lab.ca, "valid_from_days": 1, "valid_to_days": 9}, "certificate is not yet valid"),
        "self-signed": ({}, "CERTIFICATE_VERIFY_FAILED"),
    }
    for kind, (how, why) in kinds.items():
        pairs = {role: forged(tmp_path, f"{kind}-{role}", [identity(CLUSTER, role).uri], **how) for role in PeerRole}
        found[kind] = {role: TlsFiles(ca, pair.cert, pair.key) for role, pair in pairs.items()}, why
    return found


async def knock(addresses: dict[str, str], at: str, method: Method, files: TlsFiles | None) -> tuple[grpc.StatusCode, str]:
    """One call over a connection of its own."""
    server = identity(CLUSTER, "worker" if at == "worker" else "orchestrator")
    dialer = Dialer() if files is None else Dialer(trust=Showing(files).trust(server))
    async with dialer.open(addresses[at]) as channel:
        return await outcome(channel, method)


def refusals(logs: Path, file: str, why: str) -> int:
    """Lines of a process's log about handshakes that were refused for this reason."""
    return sum("Handshake failed" in line and why in line for line in (logs / file).read_text().splitlines())


@pytest.mark.timeout(90)
def test_who_has_no_certificate_of_the_ca_gets_through_no_handshake(autan: Autan, tmp_path: Path) -> None:
    lab, stranger = a_lab(tmp_path / "tls", CLUSTER), a_lab(tmp_path / "stranger", CLUSTER)
    autan.json("up", autan.file(CLUSTER, cluster_values(CLUSTER, network={"tls": lab.section})), "--detach")
    assert json.loads((autan.home / "run" / f"{CLUSTER}.json").read_text())["endpoint"].startswith("unix://")
    addresses, logs = listening(autan), autan.home / "run" / CLUSTER / "logs"
    rpcs = [(at, method) for at, names in LISTENERS.items() for method in every_method() if method.service in names]
    assert {method.path for _, method in rpcs} == {method.path for method in every_method()}

    async def attack(shown: dict[PeerRole, TlsFiles | None]) -> None:
        for at, method in rpcs:
            role = min(roles_of(method.path))  # it claims what would be let in
            code, text = await knock(addresses, at, method, shown[role])
            assert code is grpc.StatusCode.UNAVAILABLE, f"{name}: {at} {method.path}: {code} {text}"

    for name, (shown, why) in bad_files(lab, stranger, tmp_path).items():
        asyncio.run(attack(shown))
        at_worker = sum(at == "worker" for at, _ in rpcs)
        for file, least in (("decode-0.0.log", at_worker), ("up.log", len(rpcs) - at_worker)):
            deadline_s = time.monotonic() + 10.0
            while (seen := refusals(logs, file, why)) < least:
                assert time.monotonic() < deadline_s, f"{name}: {file} tells of {seen} of {least} refusals"
                time.sleep(0.02)
    good = autan.json("generate", "--token-ids", "5,6,7", "--max-tokens", "4")
    assert good["usage"]["completion_tokens"] == 4, "those inside are not disturbed"

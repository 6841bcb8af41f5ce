"""Peers without a certificate of the CA, on every RPC of what `autan up` starts: refused, and the log says why."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from orchestrator.ingress.auth import key_digest
from protos.contract.identity import PeerRole, roles_of
from protos.rpc import Dialer
from protos.tls_files import TlsFiles
from tests.support.certificates import Lab, Showing, a_lab, forged, identity
from tests.support.command import Autan, cluster_values
from tests.support.rpc_methods import LISTENERS, Method, every_method, outcome

CLUSTER = "shut"
KEY = "secret"


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


@dataclass(frozen=True)
class Shut:
    """A running cluster that only peers with certificates and keys get into."""

    lab: Lab
    local: Autan
    addresses: dict[str, str]

    def log(self, file: str) -> str:
        """The log of one process."""
        return (self.local.home / "run" / CLUSTER / "logs" / file).read_text()

    def refusals(self, file: str, why: str) -> int:
        """Lines of a process's log about handshakes that were refused for this reason."""
        return sum("Handshake failed" in line and why in line for line in self.log(file).splitlines())


@pytest.fixture(scope="module")
def shut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shut]:
    directory = tmp_path_factory.mktemp("shut")
    lab, keys = a_lab(directory / "tls", CLUSTER), directory / "keys.json"
    keys.write_text(json.dumps([{"id": "k", "sha256": key_digest(KEY), "tenant": "acme", "role": "admin"}]))
    keys.chmod(0o600)
    ingress = {"address": "127.0.0.1:0", "keys_file": str(keys)}
    with tempfile.TemporaryDirectory(prefix="autan-") as home:
        local = Autan(Path(home), extra={"AUTAN_API_KEY": KEY})
        try:
            file = local.file(CLUSTER, cluster_values(CLUSTER, network={"tls": lab.section}, ingress=ingress))
            local.json("up", file, "--detach")
            yield Shut(lab, local, listening(local))
        finally:
            local.down_all()


@pytest.mark.timeout(150)
def test_who_has_no_certificate_of_the_ca_gets_through_no_handshake(shut: Shut, tmp_path: Path) -> None:
    stranger = a_lab(tmp_path / "stranger", CLUSTER)
    rpcs = [(at, method) for at, names in LISTENERS.items() for method in every_method() if method.service in names]
    assert {method.path for _, method in rpcs} == {method.path for method in every_method()}

    async def attack(shown: dict[PeerRole, TlsFiles | None]) -> None:
        for at, method in rpcs:
            role = min(roles_of(method.path))  # it claims what would be let in
            code, text = await knock(shut.addresses, at, method, shown[role])
            assert code is grpc.StatusCode.UNAVAILABLE, f"{name}: {at} {method.path}: {code} {text}"

    for name, (shown, why) in bad_files(shut.lab, stranger, tmp_path).items():
        asyncio.run(attack(shown))
        at_worker = sum(at == "worker" for at, _ in rpcs)
        for file, least in (("decode-0.0.log", at_worker), ("up.log", len(rpcs) - at_worker)):
            deadline_s = time.monotonic() + 10.0
            while (seen := shut.refusals(file, why)) < least:
                assert time.monotonic() < deadline_s, f"{name}: {file} tells of {seen} of {least} refusals"
                time.sleep(0.02)


@pytest.mark.timeout(150)
def test_commands_reach_it_here_over_a_socket_and_elsewhere_with_a_certificate_and_a_key(shut: Shut, tmp_path: Path) -> None:
    run_file = json.loads((shut.local.home / "run" / f"{CLUSTER}.json").read_text())
    assert run_file["endpoint"].startswith("unix://")
    endpoint = {"AUTAN_ENDPOINT": shut.addresses["orchestrator"], "AUTAN_API_KEY": KEY}

    def elsewhere(role: str) -> Autan:
        files = shut.lab.files(role)
        tls = {"AUTAN_TLS_CA": str(files.ca), "AUTAN_TLS_CERT": str(files.cert), "AUTAN_TLS_KEY": str(files.key)}
        return Autan(tmp_path, extra={**endpoint, **tls})

    report = elsewhere("admin").json("doctor")
    assert report["healthy"]
    examined = {one["subject"] for one in report["checks"] if one["name"] == "certificate"}
    assert examined == {"orchestrator", "prefill-0", "decode-0"}
    answer = elsewhere("client").json("generate", "--token-ids", "5,6,7", "--max-tokens", "4")
    assert answer["usage"]["completion_tokens"] == 4
    done = elsewhere("client")("status", "--timeout", "1")
    assert done.returncode == 4 and "does not answer the client" in done.stderr
    assert "/autan.v1.Admin/Status does not answer the client" in shut.log("orchestrator.log")
    done = Autan(tmp_path, extra=endpoint)("status", "--timeout", "1")
    assert done.returncode == 3 and "AUTAN_TLS_CA" in done.stderr

"""Where a worker may listen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.worker_spec import WorkerSpec
from protos.contract.errors import ConfigError
from tests.support.certificates import Lab, a_lab
from workers.service.wire import Wire, bind_host


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return a_lab(tmp_path / "tls", "c")


def spec(network: dict[str, Any], **changes: Any) -> WorkerSpec:
    values = {
        "cluster": "c", "instance_id": "w-0", "pool": "w", "role": "combined", "store_url": "unix:///s",
        "model": {"name": "oracle", "source": "oracle"}, "engine": {"kind": "oracle"}, "network": network,
    }  # fmt: skip
    return WorkerSpec.model_validate({**values, **changes})


def test_addresses_that_others_reach_need_certificates_or_insistence(lab: Lab) -> None:
    outside = {"node_address": "10.1.2.3"}
    assert bind_host(spec({})) == "127.0.0.1"
    assert bind_host(spec({"bind": "node", "tls": lab.section}, **outside)) == "10.1.2.3"
    assert bind_host(spec({"bind": "node", "insecure": True}, **outside)) == "10.1.2.3"
    assert bind_host(spec({"bind": "node", "tls": lab.section, "insecure": True}, ranks=2, **outside)) == "10.1.2.3"
    assert bind_host(spec({"bind": "node"}, node_address="127.0.0.2")) == "127.0.0.2"
    with pytest.raises(ConfigError, match="other machines: it needs network"):
        bind_host(spec({"bind": "node"}, **outside))
    with pytest.raises(ConfigError, match="2 ranks of w-0 compute over connections that have no TLS"):
        bind_host(spec({"bind": "node", "tls": lab.section}, ranks=2, **outside))


def test_a_worker_demands_the_role_that_it_dials(lab: Lab) -> None:
    wire = Wire(spec({"tls": lab.section}))
    demanded = [dict(dialer.trust.channel_options()) for dialer in (wire.peers, wire.ingresses) if dialer.trust is not None]
    key = "grpc.ssl_target_name_override"
    assert [one[key] for one in demanded] == ["worker.c.autan", "orchestrator.c.autan"]
    plain = Wire(spec({}))
    assert plain.peers.trust is plain.ingresses.trust is None
    with pytest.raises(ConfigError, match="this process is the worker"):
        Wire(spec({"tls": {**lab.section, "worker": lab.section["orchestrator"]}}))

"""The sections about certificates: what may be reached from outside with them, and what still may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema.cluster import ClusterConfig

PAIR = {"cert": "/t/a.pem", "key": "/t/a.key"}
TLS = {"ca": "/t/ca.pem", "orchestrator": PAIR, "worker": PAIR}
OUTSIDE = "10.0.0.5:50600"


def cluster(ranks: int = 1, **sections: Any) -> ClusterConfig:
    engine = {"kind": "torch", "num_blocks": 8}
    pools = [{"name": role, "role": role, "ranks": ranks, "engine": engine} for role in ("prefill", "decode")]
    return ClusterConfig.model_validate({"name": "c", "model": {"name": "m", "source": "demo"}, "pools": pools, **sections})


@pytest.mark.parametrize(
    "sections",
    [
        {"network": {"tls": TLS}},
        {"network": {"tls": TLS, "bind": "node"}, "ingress": {"address": OUTSIDE, "keys_file": "k"}},
        {"ingress": {"address": OUTSIDE, "tls": PAIR, "keys_file": "k"}},
        {"ingress": {"tls": {**PAIR, "client_ca": "/t/clients.pem"}, "keys_file": "k"}},
        {"network": {"tls": TLS, "bind": "node", "insecure": True}, "ranks": 2},
        {"network": {"tls": TLS}, "ranks": 2},
    ],
)
def test_what_certificates_allow(sections: dict[str, Any]) -> None:
    assert cluster(**sections).name == "c"


@pytest.mark.parametrize(
    ("sections", "at", "words"),
    [
        ({"ingress": {"address": OUTSIDE, "keys_file": "k"}}, ("ingress", "address"), "needs TLS (ingress.tls or network.tls)"),
        ({"ingress": {"tls": PAIR}}, ("ingress", "tls"), "needs ingress.keys_file"),
        ({"ingress": {"address": "unix:///s", "tls": PAIR, "keys_file": "k"}}, ("ingress", "tls"), "is for TCP"),
        ({"network": {"tls": TLS, "bind": "node"}, "ranks": 2}, ("pools", 0, "ranks"), "connections that have no TLS"),
        ({"network": {"tls": {**TLS, "ca": "ca.pem"}}}, ("network", "tls", "ca"), "'ca.pem' is not absolute"),
        ({"network": {"tls": {"ca": "/c"}}}, ("network", "tls", "worker"), "required"),
        ({"network": {"tls": {**TLS, "worker": {"cert": "/c"}}}}, ("network", "tls", "worker", "key"), "required"),
        ({"network": {"tls": {**TLS, "crl": "/c"}}}, ("network", "tls", "crl"), "not permitted"),
    ],
)
def test_what_is_refused_and_where(sections: dict[str, Any], at: tuple[str | int, ...], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        cluster(**sections)
    assert any(one["loc"] == at and words in one["msg"] for one in caught.value.errors()), caught.value

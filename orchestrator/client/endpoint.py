"""Where the cluster is."""

from __future__ import annotations

import json

from configs import env
from configs.address import parse_address
from orchestrator.ingress.clock import wall_clock_s
from protos.contract.errors import ClusterUnreachable, ConfigError
from protos.contract.identity import PeerIdentity, PeerRole
from protos.rpc import Dialer
from protos.tls import Certificates
from protos.tls_files import TlsFiles


def find_endpoint(cluster: str | None = None) -> str:
    """AUTAN_ENDPOINT, or the endpoint in `AUTAN_HOME/run/<cluster>.json`, which `autan up` writes.

    Raises ClusterUnreachable when nothing runs here, ConfigError when several clusters do and none is named.
    """
    named = env.endpoint()
    if named is not None and cluster is None:
        return named
    run_dir = env.home_dir() / "run"
    files = sorted(run_dir.glob("*.json")) if cluster is None else [run_dir / f"{cluster}.json"]
    if len(files) > 1:
        names = ", ".join(file.stem for file in files)
        raise ConfigError(f"several clusters run here ({names}): name one, or set {env.ENDPOINT}")
    try:
        endpoint = json.loads(files[0].read_text(encoding="utf-8"))["endpoint"]
    except (IndexError, FileNotFoundError):
        which = f"cluster {cluster}" if cluster else "no cluster"
        state = "does not run" if cluster else "runs"
        raise ClusterUnreachable(f"{which} {state} here: start one with `autan up`, or set {env.ENDPOINT}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{files[0]}: no endpoint can be read from it; remove the file if the cluster is gone") from error
    return str(endpoint)


def find_tls(cluster: str | None = None) -> TlsFiles:
    """The certificates that go with `find_endpoint(cluster)`: those of AUTAN_TLS_CA for AUTAN_ENDPOINT, none for a run file.

    What runs on this machine is reached without: over its unix socket where its TCP has TLS. Raises ConfigError.
    """
    return TlsFiles(*env.client_tls()) if cluster is None and env.endpoint() is not None else TlsFiles()


def dialer_to(endpoint: str, tls: TlsFiles) -> Dialer:
    """How clients reach an ingress. Raises ConfigError for certificates that cannot be used.

    Who shows a certificate of a cluster demands that of the cluster's orchestrator, at whatever address; who shows none, or
    one of another kind, demands a certificate for the host that is dialled.
    """
    if tls.ca is None or parse_address(endpoint).path:
        return Dialer()
    certificates = Certificates(tls, wall_clock_s)
    me = certificates.identity
    return Dialer(trust=certificates.trust(None if me is None else PeerIdentity(me.cluster, PeerRole.ORCHESTRATOR)))

"""Where the cluster is."""

from __future__ import annotations

import json

from configs import env
from protos.contract.errors import ClusterUnreachable, ConfigError


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

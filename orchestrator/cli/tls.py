"""`autan tls`: certificates of a cluster, and what is in those that there are."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509

from configs.env import TLS_CA, TLS_CERT, TLS_KEY
from orchestrator.cli.connect import Json
from orchestrator.cli.lab_ca import LabCa, Pair
from orchestrator.cli.output import print_json, print_table, stdout
from protos.certificates import certificates_in, named_identity, server_names
from protos.contract.errors import AuthError, ConfigError
from protos.contract.identity import PeerRole
from protos.contract.redis_names import is_name

app = typer.Typer(help="Make and examine certificates.", no_args_is_help=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where the files are.")]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How long the certificates hold.")]
Hosts = Annotated[list[str] | None, typer.Option("--node", help="Host name or IP that clients dial; may be repeated.")]


@app.command("init")
def init(
    directory: Directory,
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="The `name` in the cluster file.")] = "autan",
    node: Hosts = None,
    days: Days = 365,
    as_json: Json = False,
) -> None:
    """Make an authority and a certificate for each role. Exit code 2 when the directory has some already."""
    if not is_name(cluster):
        raise ConfigError(f"--cluster: {cluster!r} is not 1 to 64 characters of A-Z a-z 0-9 _ . -")
    directory = directory.absolute()
    ca = LabCa.create(directory, cluster)
    hosts = {PeerRole.ORCHESTRATOR: node or []}
    pairs = {role: ca.issue(role, hosts=hosts.get(role, ()), days=days) for role in PeerRole}
    if as_json:
        print_json({"cluster": cluster, "ca": str(ca.path), "certificates": {r.value: _pair(p) for r, p in pairs.items()}})
        return
    stdout.print(_instructions(ca, pairs), markup=False)


@app.command("issue")
def issue(
    directory: Directory,
    role: Annotated[PeerRole, typer.Argument(help="Whom the certificate is for.")],
    name: Annotated[str | None, typer.Option(help="NAME.pem and NAME.key instead of those of the role.")] = None,
    node: Hosts = None,
    days: Days = 365,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of the one that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Make another certificate with the authority of `autan tls init`. Running processes take a replaced one by themselves."""
    ca = LabCa.open(directory.absolute())
    pair = ca.issue(role, name=name, hosts=node or (), days=days, replace=replace)
    if as_json:
        print_json({"cluster": ca.cluster, "role": role.value, **_pair(pair)})
    else:
        stdout.print(f"{role} of cluster {ca.cluster}: {pair.cert}, {pair.key}", markup=False)


@app.command("show")
def show(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR|FILE...", help="Certificates, or directories of them.")],
    as_json: Json = False,
) -> None:
    """Say whose the certificates are and when they expire. Exit code 1 when one has expired."""
    files = [file for path in paths for file in (sorted(path.glob("*.pem")) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(f"{paths[0]}: holds no .pem file; `autan tls init` makes some")
    rows = [_row(file) for file in files]
    if as_json:
        print_json({"certificates": rows})
    else:
        columns = ("file", "who", "cluster", "expires", "days left", "hosts")
        print_table(columns, [tuple(str(row[c.replace(" ", "_")]) for c in columns) for row in rows])
    if any(row["days_left"] < 0 for row in rows):
        raise typer.Exit(1)


def _row(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    certificate = certificates_in(raw, path)[0]
    who, cluster = _who(certificate)
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    return {
        "file": str(path),
        "who": who,
        "cluster": cluster,
        "expires": certificate.not_valid_after_utc.isoformat(),
        "days_left": left.days,
        "hosts": [name for name in server_names(certificate) if not name.endswith(".autan")],
    }


def _who(certificate: x509.Certificate) -> tuple[str, str]:
    try:
        identity = named_identity(certificate)
    except AuthError:
        return certificate.subject.rfc4514_string(), ""
    return identity.role.value, identity.cluster


def _pair(pair: Pair) -> dict[str, str]:
    return {"cert": str(pair.cert), "key": str(pair.key)}


def _instructions(ca: LabCa, pairs: dict[PeerRole, Pair]) -> str:
    orchestrator, worker, admin = (pairs[role] for role in (PeerRole.ORCHESTRATOR, PeerRole.WORKER, PeerRole.ADMIN))
    return f"""\
Certificates of cluster {ca.cluster} are in {ca.directory}. In the cluster file:

network:
  tls:
    ca: {ca.path}
    orchestrator: {{cert: {orchestrator.cert}, key: {orchestrator.key}}}
    worker: {{cert: {worker.cert}, key: {worker.key}}}

Nodes of workers need ca.pem and the pair of the worker at these paths. Commands on other machines need

{TLS_CA}={ca.path} {TLS_CERT}={admin.cert} {TLS_KEY}={admin.key}

or the pair of the client, which calls no command of operators. Keep {ca.directory / "ca.key"} off the nodes."""

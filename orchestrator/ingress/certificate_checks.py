"""What `autan doctor` says of certificates: those of the ingress as they are in force, of workers as they show them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from cryptography import x509

from configs.address import parse_address
from orchestrator.ingress.clock import wall_clock_s
from orchestrator.store.replies import InstanceRecord
from protos.contract.identity import PeerIdentity, PeerRole
from protos.tls import Certificates
from protos.tls_files import TlsFiles
from protos.wire import admin

_SOON_DAYS = 14
_HANDSHAKE_S = 2.0
_AT_ONCE = 16
NAME = "certificate"


class CertificateChecks:
    """Examines on demand. `own` are the certificates of this process, by what they are for."""

    def __init__(self, own: dict[str, Certificates], files: TlsFiles | None, cluster: str) -> None:
        self._own = own
        self._files = files
        self._worker = PeerIdentity(cluster, PeerRole.WORKER)

    async def examine(self, records: Sequence[InstanceRecord]) -> list[admin.Check]:
        """One line for each certificate. Never raises for one that is bad."""
        found = [self._of_own(subject, certificates) for subject, certificates in self._own.items()]
        if self._files is not None:
            turns = asyncio.Semaphore(_AT_ONCE)
            found += await asyncio.gather(*(self._of_worker(record, self._files, turns) for record in records))
        return found

    def _of_own(self, subject: str, certificates: Certificates) -> admin.Check:
        _, bundle = certificates.current()
        assert bundle.leaf is not None, "a server shows a certificate"
        if certificates.problem:
            text = f"the files have changed and are not used: {certificates.problem}"
            return admin.Check(health=admin.HEALTH_WARNING, name=NAME, subject=subject, detail=text)
        return _of_leaf(subject, bundle.leaf)

    async def _of_worker(self, record: InstanceRecord, files: TlsFiles, turns: asyncio.Semaphore) -> admin.Check:
        """Chain, dates and role are checked by the handshake itself, exactly as a peer would."""
        try:
            async with turns, asyncio.timeout(_HANDSHAKE_S):
                leaf = await shown_certificate(record.addr, files, self._worker)
        except (OSError, TimeoutError, ValueError) as error:  # ssl.SSLError is one
            why = getattr(error, "verify_message", "") or str(error) or "no answer in time"
            text = f"{record.addr} is not believed: {why}"
            return admin.Check(health=admin.HEALTH_BROKEN, name=NAME, subject=record.instance_id, detail=text)
        return _of_leaf(record.instance_id, leaf)


async def shown_certificate(address: str, files: TlsFiles, server: PeerIdentity) -> x509.Certificate:
    """What a server of that identity shows. Raises ssl.SSLError for one that no peer would believe, OSError, ValueError."""
    at, context = parse_address(address), ssl.create_default_context(cafile=files.ca)
    assert files.cert is not None and files.key is not None, "servers of ours ask for a certificate"
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(at.host.strip("[]"), at.port, ssl=context, server_hostname=server.server_name)
    try:
        return x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _of_leaf(subject: str, leaf: x509.Certificate) -> admin.Check:
    ends = leaf.not_valid_after_utc
    left_days = (ends - datetime.fromtimestamp(wall_clock_s(), UTC)).total_seconds() / 86_400
    health, text = admin.HEALTH_OK, f"expires {ends:%Y-%m-%d %H:%M} UTC, in {left_days:.0f} days"
    if left_days <= 0:
        health, text = admin.HEALTH_BROKEN, f"expired {ends:%Y-%m-%d %H:%M} UTC: issue a new one"
    elif left_days < _SOON_DAYS:
        health, text = admin.HEALTH_WARNING, f"{text}: issue a new one"
    return admin.Check(health=health, name=NAME, subject=subject, detail=text)

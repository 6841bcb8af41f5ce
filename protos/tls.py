"""Certificates in files as the credentials of servers and channels, read again whenever the files change.

A server asks for the certificates at every handshake, a channel when it is opened: rotation needs no restart. Open
connections go on under the certificates that they began with. Files that cannot be used (half written, expired, of somebody
else) leave what was read before in force and are logged once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from protos.contract.errors import ConfigError
from protos.contract.identity import PeerIdentity
from protos.tls_files import TlsFiles

if TYPE_CHECKING:
    from protos.certificates import TlsBundle

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int] | None, ...]


class Certificates:
    """The certificates of one process. Safe for use from any thread.

    Raises ConfigError when it is made over files that cannot be used, or that name another identity than `identity`.
    """

    def __init__(self, files: TlsFiles, wall_clock_s: Callable[[], float], identity: PeerIdentity | None = None) -> None:
        self._files = files
        self._wall_clock_s = wall_clock_s
        self._expected = identity
        self._lock = threading.Lock()
        self._seen = _stamp(files)
        self._bundle = _read(files, wall_clock_s(), identity)
        self._generation = 1
        self.problem = ""  # why files that changed are not used; empty while they are

    @property
    def identity(self) -> PeerIdentity | None:
        """Who the certificate says this process is."""
        return self.current()[1].identity

    @property
    def generation(self) -> int:
        """Grows whenever other certificates come into force."""
        return self.current()[0]

    def current(self) -> tuple[int, TlsBundle]:
        """The generation and what the files hold now, or what they last held that could be used."""
        with self._lock:
            stamp = _stamp(self._files)
            if stamp != self._seen:
                self._seen = stamp
                self._reload()
            return self._generation, self._bundle

    def server_credentials(self, *, ask_clients: bool = True) -> grpc.ServerCredentials:
        """For one port of one server. `ask_clients`: no handshake without a certificate of the CA file."""
        given, bundle = self.current()

        def fetch() -> Any:
            nonlocal given
            generation, fresh = self.current()
            if generation == given:
                return None  # gRPC goes on with what it has
            given = generation
            return _configuration(fresh)

        return grpc.dynamic_ssl_server_credentials(_configuration(bundle), fetch, require_client_authentication=ask_clients)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For one channel, which keeps them for its life."""
        _, bundle = self.current()
        return grpc.ssl_channel_credentials(bundle.ca, bundle.key, bundle.chain)

    def trust(self, server: PeerIdentity | None) -> Trust:
        """How to dial a server of that identity; none: one whose certificate names the address that is dialled."""
        return Trust(self, server)

    def _reload(self) -> None:
        names = ", ".join(str(path) for path in self._files.paths)
        try:
            self._bundle = _read(self._files, self._wall_clock_s(), self._expected)
        except ConfigError as error:
            self.problem = error.message
            logger.error("changed certificates are not used, those from before stay in force: %s", error)
            return
        self._generation += 1
        self.problem = ""
        logger.info("certificates were read again: %s", names)


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom a channel believes, and what it shows."""

    certificates: Certificates
    server: PeerIdentity | None

    @property
    def generation(self) -> int:
        """Of the certificates: a channel of an older one is to be replaced."""
        return self.certificates.generation

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For one channel."""
        return self.certificates.channel_credentials()

    def channel_options(self) -> list[tuple[str, Any]]:
        """The name that the server's certificate must have, when it is not the address."""
        return [] if self.server is None else [("grpc.ssl_target_name_override", self.server.server_name)]


def _read(files: TlsFiles, now_s: float, expected: PeerIdentity | None) -> TlsBundle:
    from protos.certificates import read_bundle  # only who has certificates pays for the library that reads them

    return read_bundle(files, now_s, expected)


def _configuration(bundle: TlsBundle) -> Any:
    assert bundle.key is not None and bundle.chain is not None, "a server shows a certificate"
    return grpc.ssl_server_certificate_configuration([(bundle.key, bundle.chain)], root_certificates=bundle.ca)


def _stamp(files: TlsFiles) -> _Stamp:
    return tuple(_file_stamp(path) for path in files.paths)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size

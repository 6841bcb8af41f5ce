"""Where the listeners bind: loopback and private unix sockets; anything else only with keys, and with TLS or insistence."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Any

import grpc

from configs.address import Address, parse_address
from protos.contract.errors import ConfigError

_CONNECT_S = 0.5


def check_exposure(address: str, *, has_keys: bool, has_tls: bool, insecure: bool) -> Address:
    """The parsed address. Raises ConfigError when other machines could reach it and may not."""
    try:
        parsed = parse_address(address)
    except ValueError as error:
        raise ConfigError(f"ingress.address: {error}") from error
    if parsed.is_local:
        return parsed
    if not has_tls and not insecure:
        raise ConfigError(
            f"ingress.address: {address} can be reached from other machines and needs TLS: set ingress.tls or "
            "network.tls, or use 127.0.0.1 or unix:///path"
        )
    if not has_keys:
        raise ConfigError(f"ingress.address: {address} can be reached from other machines: it needs ingress.keys_file")
    return parsed


def bind(server: Any, address: Address, credentials: grpc.ServerCredentials | None = None) -> str:
    """Binds a grpc.aio server and returns the address that clients dial (port 0 is replaced by the one that was given).

    TCP has TLS with the credentials, plain without; a unix socket has none.

    Raises ConfigError when the address is taken or cannot be bound. A unix socket is 0600 in a directory that is the
    user's own.
    """
    if address.path:
        return _bind_unix(server, Path(address.path))
    target = f"{address.host}:{address.port}"
    if address.port and not _is_free(address):  # gRPC would say so on stderr, at length
        raise ConfigError(_taken(target, address))
    try:
        port = server.add_insecure_port(target) if credentials is None else server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise ConfigError(_taken(target, address)) from error
    if not port:
        raise ConfigError(_taken(target, address))
    return f"{address.host}:{port}"


def _is_free(address: Address) -> bool:
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(address.host.strip("[]"), address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
    except OSError:
        return False
    return True


def _taken(target: str, address: Address) -> str:
    try:
        with socket.create_connection((address.host.strip("[]"), address.port), _CONNECT_S):
            pass
    except OSError:
        return f"ingress.address: {target} cannot be bound on this machine; choose another address"
    return f"ingress.address: {target} is in use by another process; stop that one (autan down), or choose another port"


def _bind_unix(server: Any, path: Path) -> str:
    _private_directory(path.parent)
    _clear(path)
    try:
        server.add_insecure_port(f"unix:{path}")
        path.chmod(0o600)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"ingress.address: the socket {path} cannot be made; check its directory") from error
    return f"unix://{path}"


def _private_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise ConfigError(f"ingress.address: {directory} cannot be used for a socket ({error.strerror})") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"ingress.address: {directory} must be yours alone; run chmod 700 on it, or choose another directory")


def _clear(path: Path) -> None:
    """Removes a socket that nobody listens on; gRPC itself would take a live one away without asking."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"ingress.address: {path} is there and is no socket; remove it, or choose another path")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.settimeout(_CONNECT_S)
        with contextlib.suppress(TimeoutError):
            probe.connect(str(path))
        raise ConfigError(f"ingress.address: {path} is in use by another process; stop that one (autan down)")
    path.unlink(missing_ok=True)

"""Socket addresses as the cluster file, the environment and the commands write them: `host:port` or `unix:///path`."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253}):(?P<port>[0-9]{1,5})\Z")
_UNIX = "unix://"
_UNIX_PATH_BYTES = 107  # sun_path without its closing NUL


@dataclass(frozen=True, slots=True)
class Address:
    """Either `host` and `port`, or `path` of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_local(self) -> bool:
        """True when nothing outside this machine can reach it: a unix socket, localhost, or a loopback address."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Raises ValueError, with the reason, for what is neither `host:port` nor `unix:///absolute/path`."""
    if text.startswith(_UNIX):
        path = text.removeprefix(_UNIX)
        if not path.startswith("/") or "\0" in path:
            raise ValueError(f"{text!r}: a unix socket is written unix:///absolute/path")
        if len(path.encode()) > _UNIX_PATH_BYTES:
            raise ValueError(f"{text!r}: the path of a unix socket has at most {_UNIX_PATH_BYTES} bytes")
        return Address(path=path)
    match = _HOST_PORT.match(text)
    if match is None:
        raise ValueError(f"{text!r} is neither host:port nor unix:///absolute/path")
    port = int(match["port"])
    if port > 65_535:
        raise ValueError(f"{text!r}: port {port} is above 65535")
    return Address(host=match["host"], port=port)

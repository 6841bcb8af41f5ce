"""The environment variables of Autan; nothing else in the product reads the environment.

    AUTAN_HOME         run directories, sockets, logs      absolute path, default ~/.autan
    AUTAN_MODEL_CACHE  imported models                     absolute path, default AUTAN_HOME/models
    AUTAN_ENDPOINT     where commands and clients connect  host:port or unix:///path, default: the local cluster
    AUTAN_API_KEY      key of commands and clients         printable ASCII, default: none
    AUTAN_TLS_CA       CA of the server at AUTAN_ENDPOINT  absolute path, default: the server has no TLS
    AUTAN_TLS_CERT     certificate that clients show it    absolute path, with AUTAN_TLS_KEY; default: none
    AUTAN_TLS_KEY      key of that certificate             absolute path
    AUTAN_NATIVE       native CPU kernels                  on or off; default on where the machine can have them
    AUTAN_LOG_LEVEL    of every process                    debug, info, warning or error; default info

An empty or malformed value raises ConfigError; it is never replaced by the default. Other names are ignored, because
container platforms make `AUTAN_*` variables of their own for a service called autan.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from configs.address import parse_address
from protos.contract.errors import ConfigError

HOME = "AUTAN_HOME"
MODEL_CACHE = "AUTAN_MODEL_CACHE"
ENDPOINT = "AUTAN_ENDPOINT"
API_KEY = "AUTAN_API_KEY"
TLS_CA = "AUTAN_TLS_CA"
TLS_CERT = "AUTAN_TLS_CERT"
TLS_KEY = "AUTAN_TLS_KEY"
LOG_LEVEL = "AUTAN_LOG_LEVEL"
NATIVE = "AUTAN_NATIVE"

_LOG_LEVELS = ("debug", "info", "warning", "error")


def home_dir() -> Path:
    """The directory below which every cluster of this user has its run directory. It need not exist yet."""
    return _path(HOME) or Path.home() / ".autan"


def model_cache_dir() -> Path:
    """Where imported models are kept. It need not exist yet."""
    return _path(MODEL_CACHE) or home_dir() / "models"


def endpoint() -> str | None:
    """The ingress to talk to, when the user named one."""
    value = _value(ENDPOINT)
    if value is not None:
        try:
            parse_address(value)
        except ValueError as error:
            raise ConfigError(f"{ENDPOINT}: {error}") from error
    return value


def api_key() -> str | None:
    """The key to present, when the user has one. The value never appears in an error."""
    value = _value(API_KEY)
    if value is not None and not (value.isascii() and value.isprintable()):
        raise ConfigError(f"{API_KEY}: a key is printable ASCII; check for a line break or a stray character")
    return value


def client_tls() -> tuple[Path | None, Path | None, Path | None]:
    """CA, certificate and key with which clients reach a server that has TLS; no CA: it has none."""
    ca, cert, key = _path(TLS_CA), _path(TLS_CERT), _path(TLS_KEY)
    if (cert is None) != (key is None):
        raise ConfigError(f"{TLS_CERT} and {TLS_KEY}: a certificate goes with its key; set both or neither")
    if cert is not None and ca is None:
        raise ConfigError(f"{TLS_CERT}: without {TLS_CA} nothing says whom to believe; set it as well")
    return ca, cert, key


def native_kernels() -> bool:
    """Whether native CPU kernels may be compiled and used."""
    value = _value(NATIVE)
    if value not in (None, "on", "off"):
        raise ConfigError(f"{NATIVE}: {value!r} is neither on nor off")
    return value != "off"


def kernel_cache_dir() -> Path:
    """Where compiled kernels are kept. It need not exist yet."""
    return home_dir() / "kernels"


def log_level() -> str:
    """One of debug, info, warning, error."""
    value = _value(LOG_LEVEL)
    if value is None:
        return "info"
    if value not in _LOG_LEVELS:
        raise ConfigError(f"{LOG_LEVEL}: {value!r} is none of {', '.join(_LOG_LEVELS)}")
    return value


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with `extra` over it, for a process to start."""
    return {**os.environ, **(extra or {})}


def set_for_libraries(variables: Mapping[str, str]) -> None:
    """Sets variables that a library reads on import and offers no argument for; one that the user set is kept."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _value(name: str) -> str | None:
    value = os.environ.get(name)
    if value is not None and not value.strip():
        raise ConfigError(f"{name}: is set but empty; give it a value or unset it")
    return value


def _path(name: str) -> Path | None:
    value = _value(name)
    if value is None:
        return None
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise ConfigError(f"{name}: {value!r} is not absolute; processes with another working directory would not find it")
    return path

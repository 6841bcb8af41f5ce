"""Where certificates are, for those who only pass it on: what reads them (protos/certificates.py) is slow to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the certificates of one process are. `ca`: whom it trusts; `cert` and `key`: what it shows. Either may lack."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        assert (self.cert is None) == (self.key is None), "a certificate goes with its key"

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that there are."""
        return tuple(path for path in (self.ca, self.cert, self.key) if path is not None)

"""Files of certificates: which are refused and why, and that only usable ones come into force."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli.lab_ca import LabCa
from protos.certificates import read_bundle
from protos.contract.errors import ConfigError
from protos.contract.identity import PeerRole
from protos.tls import Certificates
from protos.tls_files import TlsFiles
from tests.support.certificates import Lab, a_lab, forged, identity

DAY_S = 86_400.0


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return a_lab(tmp_path / "tls", "c")


def test_what_the_lab_makes_is_good_for_every_role(lab: Lab) -> None:
    for role in PeerRole:
        bundle = read_bundle(lab.files(role), time.time(), identity("c", role))
        assert bundle.identity == identity("c", role)
        assert (lab.ca.directory / f"{role}.key").stat().st_mode & 0o777 == 0o600
    assert read_bundle(TlsFiles(lab.ca.path), time.time()).chain is None


def test_files_that_cannot_be_used_are_named(lab: Lab, tmp_path: Path) -> None:
    worker, ca = lab.files("worker"), lab.ca
    uri, name = identity("c", "worker").uri, identity("c", "worker").server_name
    junk = tmp_path / "junk"
    junk.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    open_key = tmp_path / "open.key"
    shutil.copy(lab.ca.directory / "worker.key", open_key)
    open_key.chmod(0o644)
    huge = tmp_path / "huge"
    huge.write_bytes(b"\n" * (1024 * 1024 + 1))

    def made(stem: str, uris: list[str], *names: str, issuer: LabCa | None = ca, begin: float = -1, end: float = 1) -> TlsFiles:
        pair = forged(tmp_path, stem, uris, names=names, issuer=issuer, valid_from_days=begin, valid_to_days=end)
        return TlsFiles(ca.path, pair.cert, pair.key)

    cases = {
        "no such": (replace(worker, cert=tmp_path / "absent"), "absent: cannot be read"),
        "junk": (replace(worker, cert=junk), "junk: holds no PEM certificates"),
        "junk CA": (replace(worker, ca=junk), "junk: holds no PEM certificates"),
        "huge": (replace(worker, cert=huge), "huge: has more than"),
        "no key": (replace(worker, key=junk), "junk: "),
        "open key": (replace(worker, key=open_key), "open.key: others may read this key"),
        "other key": (replace(worker, key=lab.files("admin").key), "is not the key of"),
        "other role": (lab.files("admin"), "is that of the admin of cluster c; this process is the worker"),
        "nobody": (made("nobody", []), "names no identities"),
        "expired": (made("past", [uri], name, begin=-3, end=-1), "past.pem: expired at"),
        "early": (made("future", [uri], name, begin=1, end=3), "future.pem: is not valid before"),
        "no server name": (made("unnamed", [uri]), "lacks the DNS name worker.c.autan"),
        "self-signed": (made("alone", [uri], name, issuer=None), "no authority in"),
        "other CA": (made("foreign", [uri], name, issuer=LabCa.create(tmp_path / "other", "c")), "no authority in"),
    }
    for title, (files, words) in cases.items():
        with pytest.raises(ConfigError) as caught:
            read_bundle(files, time.time(), identity("c", "worker"))
        assert words in caught.value.message, title


def test_a_leaf_is_no_authority(lab: Lab, tmp_path: Path) -> None:
    """A certificate that the CA issued cannot issue others."""
    directory = tmp_path / "leaf"
    directory.mkdir()
    shutil.copy(lab.ca.directory / "worker.key", directory / "ca.key")
    impostor = replace_certificate(lab, directory)
    pair = forged(
        tmp_path, "under", [identity("c", "worker").uri], names=(identity("c", "worker").server_name,), issuer=impostor
    )
    chain = pair.cert.read_bytes() + (lab.ca.directory / "worker.pem").read_bytes()
    pair.cert.write_bytes(chain)
    with pytest.raises(ConfigError, match="no authority in"):
        read_bundle(TlsFiles(lab.ca.path, pair.cert, pair.key), time.time(), identity("c", "worker"))


def replace_certificate(lab: Lab, directory: Path) -> LabCa:
    leaf = read_bundle(lab.files("worker"), time.time()).leaf
    assert leaf is not None
    return LabCa(directory, "c", leaf, lab.ca._key)


def test_only_files_that_can_be_used_come_into_force(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    now_s = [time.time()]
    certificates = Certificates(lab.files("worker"), lambda: now_s[0], identity("c", "worker"))
    began, first = certificates.current()
    assert certificates.current() == (began, first)
    cert = lab.ca.directory / "worker.pem"
    good = cert.read_bytes()
    with caplog.at_level(logging.ERROR):
        for bad in (b"", b"junk", (lab.ca.directory / "admin.pem").read_bytes()):
            caplog.clear()
            cert.write_bytes(bad)
            assert certificates.current() == (began, first)
            assert certificates.current() == (began, first)
            assert len([r for r in caplog.records if "stay in force" in r.getMessage()]) == 1, "logged once"
            assert certificates.problem
        cert.unlink()
        assert certificates.current() == (began, first)
    cert.write_bytes(good)
    assert certificates.generation == began + 1
    assert not certificates.problem
    lab.ca.issue(PeerRole.WORKER, replace=True)
    generation, second = certificates.current()
    assert generation == began + 2 and second.leaf != first.leaf
    now_s[0] += 400 * DAY_S
    (lab.ca.directory / "worker.pem").touch()
    assert certificates.generation == generation, "one that has expired does not replace anything"


def test_a_process_does_not_start_with_the_certificate_of_another(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="is that of the orchestrator of cluster c; this process is the worker of cluster c"):
        Certificates(lab.files("orchestrator"), time.time, identity("c", "worker"))
    with pytest.raises(ConfigError, match="this process is the worker of cluster d"):
        Certificates(lab.files("worker"), time.time, identity("d", "worker"))

"""Keys: who passes, who does not, and which key files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.ingress.auth import LOCAL, METHOD_ROLES, Authoriser, Role, key_digest, load_keys
from protos.contract.errors import AuthError, ConfigError, Forbidden, Unauthenticated

GENERATE = "/autan.v1.Inference/Generate"
STATUS = "/autan.v1.Admin/Status"


def an_entry(key: str, **fields: object) -> dict[str, object]:
    return {"id": key, "sha256": key_digest(key), "tenant": f"tenant-{key}", "role": "client", **fields}


def write_keys(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries))
    path.chmod(0o600)
    return path


@pytest.fixture
def authoriser(tmp_path: Path) -> Authoriser:
    entries = [
        an_entry("alice"),
        an_entry("root", role="admin"),
        an_entry("old", expires_at="2020-01-01T00:00:00Z"),
        an_entry("young", expires_at="2001-09-09T01:46:41Z"),
    ]
    return load_keys(write_keys(tmp_path / "keys.json", entries), wall_clock_s=lambda: 1_000_000_000.0)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_tenant_is_that_of_the_key(authoriser: Authoriser) -> None:
    principal = authoriser(GENERATE, {**bearer("alice"), "tenant": "tenant-root"})
    assert (principal.tenant, principal.role) == ("tenant-alice", Role.CLIENT)


def test_an_expiry_counts_from_its_second(authoriser: Authoriser, tmp_path: Path) -> None:
    assert authoriser(GENERATE, bearer("young")).key_id == "young"
    late = load_keys(write_keys(tmp_path / "k2.json", [an_entry("old", expires_at="2020-01-01T00:00:00Z")]))
    with pytest.raises(Unauthenticated, match="has expired"):
        late(GENERATE, bearer("old"))


@pytest.mark.parametrize(
    "value", ["", "alice", "Basic alice", "Bearer ", "Bearer nobody", "Bearer " + "x" * 600, "Bearer ALICE"]
)
@pytest.mark.parametrize("method", [*METHOD_ROLES, "/autan.v1.Inference/Unheard", ""])
def test_without_a_known_key_every_method_is_refused(authoriser: Authoriser, method: str, value: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        authoriser(method, {"authorization": value})
    assert "alice" not in refused.value.message and "nobody" not in refused.value.message


@pytest.mark.parametrize("method", METHOD_ROLES)
def test_a_client_reaches_client_methods_and_an_admin_all(authoriser: Authoriser, method: str) -> None:
    assert authoriser(method, bearer("root")).role is Role.ADMIN
    if METHOD_ROLES[method] is Role.ADMIN:
        with pytest.raises(Forbidden):
            authoriser(method, bearer("alice"))
    else:
        assert authoriser(method, bearer("alice")).role is Role.CLIENT


def test_a_method_that_is_not_listed_is_refused_to_everybody(authoriser: Authoriser) -> None:
    for guard, metadata in ((authoriser, bearer("root")), (Authoriser(), {})):
        with pytest.raises(Forbidden):
            guard("/autan.v1.Inference/Unheard", metadata)


def test_without_a_key_file_everybody_is_the_local_admin() -> None:
    assert Authoriser()(STATUS, {}) == LOCAL


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {},
        [5],
        [{**an_entry("a"), "admin": True}],
        [{"id": "a"}],
        [an_entry("a", sha256="secret")],
        [an_entry("a", sha256=key_digest("a").upper())],
        [an_entry("a", role="root")],
        [an_entry("a", tenant="a b")],
        [an_entry("a", tenant=5)],
        [an_entry("a", expires_at="tomorrow")],
        [an_entry("a", expires_at="2030-01-01T00:00:00")],
        [an_entry("a", expires_at=5)],
        [an_entry("a"), an_entry("a")],
        [an_entry("a"), {**an_entry("b"), "sha256": key_digest("a")}],
    ],
)
def test_bad_key_files_are_refused(tmp_path: Path, entries: object) -> None:
    with pytest.raises(ConfigError, match=r"keys\.json"):
        load_keys(write_keys(tmp_path / "keys.json", entries))


def test_a_key_file_that_others_may_write_or_nobody_can_read_is_refused(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", [an_entry("a")])
    path.chmod(0o622)
    with pytest.raises(ConfigError, match="chmod"):
        load_keys(path)
    for broken in (b"[", b"\xff", b"[" * 100_000):
        path.chmod(0o600)
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match="JSON"):
            load_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(tmp_path / "none.json")


def test_secrets_show_in_no_repr(authoriser: Authoriser) -> None:
    with pytest.raises(AuthError) as refused:
        authoriser(STATUS, bearer("alice"))
    shown = repr(vars(authoriser)) + repr(refused.value)
    assert key_digest("alice") not in shown and bytes.fromhex(key_digest("alice")).hex() not in shown

"""The environment variables: defaults, and no bad value is swallowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs import env
from protos.contract.errors import ConfigError


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (env.HOME, env.MODEL_CACHE, env.ENDPOINT, env.API_KEY, env.TLS_CA, env.TLS_CERT, env.TLS_KEY, env.LOG_LEVEL):
        monkeypatch.delenv(name, raising=False)


def test_defaults() -> None:
    assert env.home_dir() == Path.home() / ".autan"
    assert env.model_cache_dir() == Path.home() / ".autan" / "models"
    assert (env.endpoint(), env.api_key(), env.log_level()) == (None, None, "info")


def test_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.HOME, "/srv/autan")
    assert env.model_cache_dir() == Path("/srv/autan/models")
    monkeypatch.setenv(env.MODEL_CACHE, "~/cache")
    monkeypatch.setenv(env.ENDPOINT, "unix:///run/autan.sock")
    monkeypatch.setenv(env.API_KEY, "ak_1")
    monkeypatch.setenv(env.LOG_LEVEL, "debug")
    assert env.model_cache_dir() == Path.home() / "cache"
    assert (env.endpoint(), env.api_key(), env.log_level()) == ("unix:///run/autan.sock", "ak_1", "debug")


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        (env.HOME, "", env.home_dir),
        (env.HOME, "relative/path", env.home_dir),
        (env.MODEL_CACHE, " ", env.model_cache_dir),
        (env.ENDPOINT, "http://x", env.endpoint),
        (env.API_KEY, "secret\nnext", env.api_key),
        (env.LOG_LEVEL, "loud", env.log_level),
        (env.TLS_CA, "ca.pem", env.client_tls),
        (env.TLS_CERT, "/c.pem", env.client_tls),
        (env.TLS_KEY, "/c.key", env.client_tls),
    ],
)
def test_bad_values_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: Callable[[], object]) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name) as caught:
        read()
    assert "secret" not in str(caught.value)


def test_children_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTAN_TEST_SET", "user's")
    monkeypatch.delenv("AUTAN_TEST_UNSET", raising=False)
    monkeypatch.setenv("AUTAN_TEST_UNSET", "x")  # so that the fixture restores it
    monkeypatch.delenv("AUTAN_TEST_UNSET")
    env.set_for_libraries({"AUTAN_TEST_SET": "ours", "AUTAN_TEST_UNSET": "ours"})
    child = env.child_environment({"MORE": "1"})
    assert (child["AUTAN_TEST_SET"], child["AUTAN_TEST_UNSET"], child["MORE"]) == ("user's", "ours", "1")
    assert "MORE" not in env.child_environment()


def test_certificates_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.client_tls() == (None, None, None)
    monkeypatch.setenv(env.TLS_CERT, "/c.pem")
    monkeypatch.setenv(env.TLS_KEY, "/c.key")
    with pytest.raises(ConfigError, match=env.TLS_CA):
        env.client_tls()
    monkeypatch.setenv(env.TLS_CA, "/ca.pem")
    assert env.client_tls() == (Path("/ca.pem"), Path("/c.pem"), Path("/c.key"))

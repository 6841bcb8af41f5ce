"""Addresses: what is one, and what stays on this machine."""

from __future__ import annotations

import pytest

from configs.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "address", "is_local"),
    [
        ("127.0.0.1:50600", Address("127.0.0.1", 50600), True),
        ("127.9.8.7:0", Address("127.9.8.7", 0), True),
        ("localhost:1", Address("localhost", 1), True),
        ("[::1]:65535", Address("[::1]", 65535), True),
        ("unix:///run/a.sock", Address(path="/run/a.sock"), True),
        ("0.0.0.0:1", Address("0.0.0.0", 1), False),
        ("[::]:1", Address("[::]", 1), False),
        ("10.0.0.1:1", Address("10.0.0.1", 1), False),
        ("localhost.evil.example:1", Address("localhost.evil.example", 1), False),
        ("127.0.0.1.evil.example:1", Address("127.0.0.1.evil.example", 1), False),
    ],
)
def test_addresses(text: str, address: Address, is_local: bool) -> None:
    assert parse_address(text) == address
    assert parse_address(text).is_local is is_local


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":80",
        "host:65536",
        "host:-1",
        "host:1\n",
        "a b:1",
        "unix://rel",
        "unix:///" + "x" * 120,
        "::1:80",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_address(text)

"""The Function library `autan_v1`: its text from the `.lua` files, and loading it.

The text is the same on every machine for the same files, so comparing texts tells whether a server has this version.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from redis.asyncio import Redis

from protos.contract.redis_names import LIBRARY


@cache
def library_text() -> str:
    """All `.lua` files in the order of their names (shared parts are numbered) behind one shebang."""
    folder = resources.files("orchestrator.store.lua")
    parts = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".lua")), key=lambda entry: entry.name)
    bodies = [part.read_text(encoding="utf-8").rstrip("\n") for part in parts]
    return "\n\n".join([f"#!lua name={LIBRARY}", *bodies]) + "\n"


async def load_library(redis: Redis) -> bool:
    """Makes the server have exactly this library; True when it had to be loaded. Idempotent.

    Raises what redis-py raises.
    """
    text = library_text()
    if await _loaded_text(redis) == text:
        return False
    await redis.function_load(text, replace=True)
    return True


async def _loaded_text(redis: Redis) -> str | None:
    listed = await redis.function_list(LIBRARY, withcode=True)
    for entry in listed:
        pairs = entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))
        code = pairs.get(b"library_code")
        if code is not None:
            return bytes(code).decode()
    return None

"""What must hold in the store after every call, read from the keys themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from tests.support.store import RawStore

LIVE = {"QUEUED", "ASSIGNED", "PREFILLING", "DECODING"}
PLACED = LIVE - {"QUEUED"}
HELD = {"PREFILLING", "DECODING"}
LOAD = ("p_requests", "p_tokens", "p_blocks", "d_requests", "d_blocks", "m_in", "m_out")

# One script: time stands in it, so that no key expires between two readings.
_READ_ALL = """
local found, reads = {}, {
  hash = {'HGETALL'}, set = {'SMEMBERS'}, string = {'GET'}, list = {'LRANGE', 0, -1}, zset = {'ZRANGE', 0, -1, 'WITHSCORES'},
}
for _, name in ipairs(redis.call('KEYS', ARGV[1])) do
  local kind = redis.call('TYPE', name).ok
  local read = reads[kind] or error(name .. ' is a ' .. kind)
  for _, part in ipairs({name, kind, redis.call('PTTL', name), redis.call(read[1], name, unpack(read, 2))}) do
    found[#found + 1] = part
  end
end
return found
"""


class Picture:
    """Every key of one cluster at one moment, decoded, with its time to live in ms (-1: none)."""

    def __init__(self, raw: RawStore) -> None:
        prefix = raw.base + ":"
        found = raw.redis.eval(_READ_ALL, 0, prefix + "*")
        self.ttl: dict[str, int] = {}
        self.keys: dict[str, Any] = {}
        for name, kind, ttl, value in zip(found[::4], found[1::4], found[2::4], found[3::4], strict=True):
            key = name.decode().removeprefix(prefix)
            self.ttl[key] = ttl
            self.keys[key] = _decode(_shaped(kind, value))

    def family(self, kind: str) -> dict[str, Any]:
        """The keys of one family, by what follows `kind:`."""
        return {name.removeprefix(kind + ":"): value for name, value in self.keys.items() if name.startswith(kind + ":")}


def _shaped(kind: bytes, value: Any) -> Any:
    """A value as the client would return it."""
    match kind:
        case b"hash":
            return dict(zip(value[::2], value[1::2], strict=True))
        case b"zset":
            return [(member, float(score)) for member, score in zip(value[::2], value[1::2], strict=True)]
        case b"set":
            return set(value)
        case _:
            return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.decode(): item.decode("latin-1") for key, item in value.items()}
    if isinstance(value, set):
        return {item.decode() for item in value}
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [item.decode("latin-1") for item in value]
    if isinstance(value, list):
        return {member.decode(): score for member, score in value}
    return value


def check_store(raw: RawStore) -> Picture:
    """Raises AssertionError when an invariant is broken; returns what was read."""
    seen = Picture(raw)
    requests = seen.family("r")
    live = {id: r for id, r in requests.items() if r["state"] in LIVE}
    _check_indexes(seen, live)
    _check_roles(seen, live)
    _check_journals(seen, requests, live)
    _check_inboxes(seen)
    known = {"r", "t", "i", "in", "parts", "own", "g"}
    single = {"ready", "lease", "deadline", "live", "instances", "owners", "sweep", "leader", "counters", "moves"}
    strangers = [name for name in seen.keys if name not in single and name.split(":")[0] not in known]
    assert not strangers, strangers
    return seen


def _check_indexes(seen: Picture, live: dict[str, Any]) -> None:
    """A live request is in exactly one place; one that ended is nowhere."""
    ready, lease = set(seen.keys.get("ready", {})), set(seen.keys.get("lease", {}))
    assert ready == {id for id, r in live.items() if r["state"] == "QUEUED"}
    assert lease == {id for id, r in live.items() if r["state"] in PLACED}
    assert set(seen.keys.get("live", {})) == set(live)
    assert set(seen.keys.get("deadline", {})) == set(live)
    owned: dict[str, set[str]] = defaultdict(set)
    for id, r in live.items():
        owned[f"{r['ing']}|{r['ing_epoch']}"].add(id)
    assert seen.family("own") == dict(owned)
    assert seen.keys.get("owners", set()) == set(owned)


def _check_roles(seen: Picture, live: dict[str, Any]) -> None:
    """The load of every instance is the sum of the open roles in it; nothing is charged or undone twice."""
    load: dict[str, Counter[str]] = defaultdict(Counter)
    parts: dict[str, set[str]] = defaultdict(set)
    for id, r in seen.family("r").items():
        is_placed = r["state"] in PLACED
        assert (r.get("d_open") == "1") == is_placed, (id, r)
        assert (r.get("p_open") == "1") == (r["state"] in {"ASSIGNED", "PREFILLING"}), (id, r)
        assert bool(r.get("holder")) == (r["state"] in {"PREFILLING", "DECODING"}), (id, r)
        assert r.get("m_open") != "1" or r["state"] == "DECODING", (id, r)
        for side in "pdm":
            if r.get(f"{side}_open") == "1":
                name, role = r[side], "p" if side == "p" else "d"
                load[name][f"{role}_requests"] += 1
                load[name][f"{role}_blocks"] += int(r[f"{side}_blocks"])
                load[name]["p_tokens"] += int(r["p_tokens"]) if side == "p" else 0
                if side == "m":
                    load[r["m"]]["m_in"] += 1
                    load[r["d"]]["m_out"] += 1
                parts[f"{name}|{r[side + '_inc']}"].add(id)
    for name, i in seen.family("i").items():
        charged = {field: int(i.get(field, 0)) for field in LOAD}
        assert charged == {field: load[name][field] for field in LOAD}, (name, charged, load[name])
    assert seen.family("parts") == dict(parts)
    ended = {f"{name}|{i['incarnation']}" for name, i in seen.family("i").items() if i["state"] in {"LOST", "STOPPED"}}
    current = {f"{name}|{i['incarnation']}" for name, i in seen.family("i").items()}
    assert {part for part in parts if part in ended or part not in current} <= seen.keys.get("sweep", set())
    assert live.keys() >= {id for members in parts.values() for id in members}


def _check_journals(seen: Picture, requests: dict[str, Any], live: dict[str, Any]) -> None:
    """Live work never expires; what ended always does, together with its journal; no journal is without a request."""
    for id in requests:
        assert (seen.ttl[f"r:{id}"] == -1) == (id in live), (id, seen.ttl[f"r:{id}"])
    for id, packed in seen.family("t").items():
        assert id in requests and len(packed) % 4 == 0
        assert (seen.ttl[f"t:{id}"] == -1) == (id in live)


def _check_inboxes(seen: Picture) -> None:
    """Only a live incarnation has an inbox."""
    instances = seen.family("i")
    for name in seen.family("in"):
        assert instances[name]["state"] in {"STARTING", "READY", "DRAINING"}, name

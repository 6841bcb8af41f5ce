"""Disk caches of instances that are gone: removed only where nobody has them and nothing else lies there."""

from __future__ import annotations

import fcntl
from pathlib import Path

from workers.kv_tiers.folders import sweep


def a_cache(base: Path, name: str, *extra: str) -> Path:
    folder = base / name
    folder.mkdir(parents=True)
    for file in ("lock", "segment-00000.kv", *extra):
        (folder / file).write_bytes(b"x" * 5000)
    return folder


def test_only_what_nobody_owns_goes_and_only_when_it_is_to(tmp_path: Path) -> None:
    base = tmp_path / "cluster"
    stale, live, strange = a_cache(base, "old-0"), a_cache(base, "new-0"), a_cache(base, "old-1", "notes.txt")
    locked, bare = a_cache(base, "old-2"), base / "old-3"
    bare.mkdir()
    elsewhere = a_cache(tmp_path, "elsewhere")
    (base / "old-4").symlink_to(elsewhere)
    (base / "old-5").write_text("no folder")
    linked = a_cache(base, "old-6")
    (linked / "segment-00001.kv").symlink_to(elsewhere / "segment-00000.kv")
    with (locked / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dry = sweep(base, {"new-0"}, apply=False)
        assert [one.removed for one in dry] == [False] * 5 and stale.exists()
        assert [one.path.name for one in dry if not one.kept_because] == ["old-0"] and dry[0].size_bytes >= 10_000
        why = {one.path.name: one.kept_because for one in sweep(base, {"new-0"}, apply=True) if not one.removed}
        assert set(why) == {"old-1", "old-2", "old-3", "old-6"}
        assert "notes.txt" in why["old-1"] and "locked" in why["old-2"] and "segment-00001" in why["old-6"]
        assert not stale.exists() and all(one.exists() for one in (live, strange, locked, elsewhere, linked, bare))
        assert len(list(elsewhere.iterdir())) == 2
    assert [one.path for one in sweep(base, {"new-0"}, apply=True) if one.removed] == [locked], "its process ended"
    assert sweep(tmp_path / "nowhere", (), apply=True) == []

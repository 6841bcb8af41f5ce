"""Which instances of a model may work together. Pure.

Requests move between instances, so all that serve one model must serve the same thing: equal fingerprints. Where they do
not, one fingerprint counts and the others are set apart: they get no work until they agree or are alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One instance that is alive. `fingerprint`: equal strings serve the same thing."""

    instance_id: str
    model: str
    fingerprint: str
    decodes: bool


def set_apart(members: Iterable[Member]) -> dict[str, str]:
    """The instances that get no work, each with one whose fingerprint counts instead.

    The fingerprint counts that most instances of the model have, of those that some instance can decode with; among
    equals the one of the smallest instance id.
    """
    by_model: dict[str, dict[str, list[Member]]] = {}
    for member in sorted(members, key=lambda one: one.instance_id):
        by_model.setdefault(member.model, {}).setdefault(member.fingerprint, []).append(member)
    apart: dict[str, str] = {}
    for groups in by_model.values():
        best = min(groups.values(), key=lambda g: (not any(m.decodes for m in g), -len(g), g[0].instance_id))
        others = (member for group in groups.values() if group is not best for member in group)
        apart.update((member.instance_id, best[0].instance_id) for member in others)
    return apart

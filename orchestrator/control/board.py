"""The instances of one model during one turn, kept in the order in which placement tries them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from orchestrator.domain.ids import InstanceId
from orchestrator.domain.instance import Role
from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.load import Load
from orchestrator.policy.placement import Candidates, Placement, PlacementRules, decode_score, prefill_score


class Board:
    """Mutable only through `charge`: an accepted placement moves its two instances back in their orders."""

    def __init__(self, loads: Iterable[Load], prefill_ready: bool, rules: PlacementRules) -> None:
        """`prefill_ready`: a prefill instance of the model is READY, whether or not it is in `loads`."""
        self._loads = {load.instance.instance_id: load for load in loads}
        self._local_roles = {Role.COMBINED}
        if rules.local_prefill and not prefill_ready:
            self._local_roles.add(Role.DECODE)
        mine = list(self._loads.values())
        self._prefill = sorted((load for load in mine if load.role is Role.PREFILL), key=prefill_score)
        self._decode = sorted((load for load in mine if load.role is not Role.PREFILL), key=decode_score)
        self._local = sorted((load for load in mine if load.role in self._local_roles), key=prefill_score)
        self.candidates = Candidates(self._prefill, self._decode, self._local)

    def __getitem__(self, instance_id: InstanceId) -> Load:
        return self._loads[instance_id]

    def charge(self, request: QueuedRequest, placement: Placement) -> None:
        """Adds a placement to the loads of its instances."""
        source = self._loads[placement.prefill]
        self._replace(source, source.with_prefill(request.prefill_tokens, placement.prefill_blocks))
        target = self._loads[placement.decode]
        self._replace(target, target.with_decode(placement.decode_blocks))

    def _replace(self, before: Load, after: Load) -> None:
        self._loads[before.instance.instance_id] = after
        if before.role is Role.PREFILL:
            del self._prefill[bisect_left(self._prefill, prefill_score(before), key=prefill_score)]
            insort(self._prefill, after, key=prefill_score)
            return
        del self._decode[bisect_left(self._decode, decode_score(before), key=decode_score)]
        insort(self._decode, after, key=decode_score)
        if before.role in self._local_roles:
            del self._local[bisect_left(self._local, prefill_score(before), key=prefill_score)]
            insort(self._local, after, key=prefill_score)

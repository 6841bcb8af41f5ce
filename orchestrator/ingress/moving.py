"""Moves of running requests that operators ask for: one request by name, or all of an instance that drains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from orchestrator.domain.ids import Epoch, InstanceId, RequestId
from orchestrator.domain.instance import InstanceView
from orchestrator.policy.migration import Move, RunningRequest, may_receive, plan_drain
from orchestrator.store.client import Store
from orchestrator.store.replies import LiveRequest, Migration
from orchestrator.store.views import cluster_view
from protos.contract.capability import Grant, expiry_ms
from protos.contract.errors import InvalidRequest, NoInstance, OutOfBlocks, UnknownRequest
from protos.contract.redis_names import Code, is_name

_WHY_NOT = {
    Code.STALE: "it has just been placed anew, or the target takes no work; look at it again",
    Code.STATE: "it does not decode now, or another move of it is under way",
    Code.FULL: "it was moved as often as scheduling.max_migrations allows",
}


SignMove = Callable[[Grant], bytes]


def unsigned_move(grant: Grant) -> bytes:
    """No capability: for workers that have no keys."""
    del grant
    return b""


class Mover:
    """Reads the store, decides with the policy, begins the moves in the store."""

    def __init__(self, store: Store, max_migrations: int, sign: SignMove = unsigned_move) -> None:
        self._store = store
        self._sign = sign
        self._max_migrations = max_migrations

    async def migrate(self, request_id: str, target_id: str) -> int:
        """Begins one move and returns its epoch.

        Raises UnknownRequest, NoInstance, InvalidRequest (not of the same fingerprint), OutOfBlocks with the reason.
        """
        request = await self._store.request(request_id)
        if request is None:
            raise UnknownRequest(f"request {request_id} does not run; `autan requests` lists what does")
        instances = await self._instances()
        source, target = instances.get(request.d), instances.get(target_id)
        if target is None:
            raise NoInstance(f"there is no instance {target_id!r}; `autan status` lists them")
        if source is None or request.state != "DECODING":
            raise InvalidRequest(f"request {request_id} is {request.state}: only what decodes can be moved")
        if not may_receive(source, target):
            raise InvalidRequest(f"{target_id} cannot go on with what {request.d} decodes: role, state or fingerprint differ")
        move = Move(RequestId(request_id), Epoch(request.epoch), target.instance_id, target.incarnation, 0)
        code, epoch = (await self._begin([move], {request_id: request}, instances))[0]
        if code not in (Code.OK, Code.DUPLICATE):
            raise OutOfBlocks(f"request {request_id} is not moved: {_WHY_NOT.get(code, code.value)}", 1.0)
        return epoch

    async def drain(self, instance_id: str, on: bool) -> list[str]:
        """Asks the instance to drain, or not to, and begins the moves of what decodes there; gives the requests that move.

        Raises NoInstance.
        """
        if not is_name(instance_id) or await self._store.drain(instance_id, on) is Code.GONE:
            raise NoInstance(f"there is no instance {instance_id!r}; `autan status` lists them")
        instances = await self._instances()
        source = instances.get(instance_id)
        if not on or source is None:
            return []
        requests = {one.request_id: one for one in (await self._store.requests_at(instance_id)).requests}
        moves = plan_drain(source, tuple(instances.values()), _running(requests.values()))
        outcomes = await self._begin(moves, requests, instances)
        begun = (Code.OK, Code.DUPLICATE)
        return [move.request_id for move, (code, _) in zip(moves, outcomes, strict=True) if code in begun]

    async def _instances(self) -> dict[str, InstanceView]:
        view = cluster_view(await self._store.view(0))
        return {str(instance.instance_id): instance for instance in view.instances}

    async def _begin(
        self, moves: Iterable[Move], requests: Mapping[str, LiveRequest], instances: Mapping[str, InstanceView]
    ) -> list[tuple[Code, int]]:
        wanted = []
        for move in moves:
            request = requests[move.request_id]
            capability = self._sign(_grant(request, instances[request.d], instances[move.target]))
            wanted.append(
                Migration(
                    move.request_id, move.epoch, move.target, move.incarnation, move.blocks, request.next_epoch, capability
                )
            )
        outcomes = await self._store.migrate(wanted, max_migrations=self._max_migrations)
        return [(outcome.code, outcome.epoch) for outcome in outcomes]


def _grant(request: LiveRequest, source: InstanceView, target: InstanceView) -> Grant:
    """As many blocks as the request may ever fill: nobody knows how far it gets until it pauses."""
    able = target.capabilities
    assert able is not None
    # The last token is never fed back: it needs no row.
    blocks = -(-(request.prompt_tokens + request.max_tokens - 1) // able.block_tokens)
    return Grant(
        request_id=request.request_id,
        epoch=request.next_epoch,
        source_instance=source.instance_id,
        source_incarnation=source.incarnation,
        target_instance=target.instance_id,
        target_incarnation=target.incarnation,
        blocks=blocks,
        kv_bytes=blocks * able.block_bytes,
        expires_at_ms=expiry_ms(request.deadline_ms),
    )


def _running(requests: Iterable[LiveRequest]) -> list[RunningRequest]:
    return [
        RunningRequest(RequestId(one.request_id), Epoch(one.epoch), InstanceId(one.d), one.prompt_tokens + one.n)
        for one in requests
        if one.state == "DECODING"
    ]

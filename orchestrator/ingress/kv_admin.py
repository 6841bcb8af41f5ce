"""The books of KV blocks of all workers, for operators."""

from __future__ import annotations

from orchestrator.ingress.worker_calls import WorkerCalls
from protos.wire import admin, audit, worker

_TIMEOUT_S = 6.0
_CACHE_OWNER_S = 600.0  # an instance that is away for less may come back to its disk cache


class KvAdmin:
    """Collects the answers of the workers. Every method raises InvalidRequest for an unknown instance, StoreUnavailable."""

    def __init__(self, workers: WorkerCalls) -> None:
        self._workers = workers

    async def list(self, request: admin.ListKvRequest) -> admin.ListKvReply:
        """Every open entry."""
        records = await self._workers.instances(request.instance_ids)
        answers = await self._workers.ask(
            records, lambda stub, _: stub.ListKv(worker.WorkerListKvRequest(), timeout=_TIMEOUT_S), _TIMEOUT_S
        )
        reply = admin.ListKvReply(unanswered=answers.unanswered)
        for record, books in answers.found:
            books.address = record.addr
            reply.books.append(books)
        return reply

    async def verify(self, request: admin.VerifyKvRequest) -> admin.VerifyKvReply:
        """The findings of every worker."""
        records = await self._workers.instances(request.instance_ids)
        answers = await self._workers.ask(
            records, lambda stub, _: stub.VerifyKv(worker.WorkerVerifyKvRequest(), timeout=_TIMEOUT_S), _TIMEOUT_S
        )
        reply = admin.VerifyKvReply(unanswered=answers.unanswered)
        for record, found in answers.found:
            found.books.address = record.addr
            reply.audits.append(found)
        return reply

    async def collect(self, request: admin.CollectKvRequest) -> admin.CollectKvReply:
        """What every worker gave back, or would."""
        records = await self._workers.instances(request.instance_ids)
        wanted = worker.WorkerCollectKvRequest(
            apply=request.apply, cache_owners=await self._workers.heard_of_within(_CACHE_OWNER_S)
        )
        answers = await self._workers.ask(records, lambda stub, _: stub.CollectKv(wanted, timeout=_TIMEOUT_S), _TIMEOUT_S)
        seen: set[tuple[str, str]] = set()
        for record, found in answers.found:
            _tell_once(record.addr.rpartition(":")[0], found, seen)
        return admin.CollectKvReply(collections=[found for _, found in answers.found], unanswered=answers.unanswered)


def _tell_once(node: str, found: audit.KvCollection, seen: set[tuple[str, str]]) -> None:
    """Workers of one node see the same folders: each is told of by the first."""
    told = [one for one in found.returns if one.kind != "disk" or (node, one.path) not in seen]
    seen |= {(node, one.path) for one in told if one.kind == "disk"}
    del found.returns[:]
    found.returns.extend(told)

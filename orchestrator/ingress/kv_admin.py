"""The books of KV blocks of all workers, for operators."""

from __future__ import annotations

from orchestrator.ingress.worker_calls import WorkerCalls
from protos.wire import admin, worker

_TIMEOUT_S = 6.0


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
        wanted = worker.WorkerCollectKvRequest(apply=request.apply)
        answers = await self._workers.ask(records, lambda stub, _: stub.CollectKv(wanted, timeout=_TIMEOUT_S), _TIMEOUT_S)
        return admin.CollectKvReply(collections=[found for _, found in answers.found], unanswered=answers.unanswered)

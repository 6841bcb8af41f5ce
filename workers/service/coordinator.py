"""What happens when a message, an engine step or an acknowledgement comes in. Everything runs on the event loop."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from protos.contract.errors import (
    AutanError,
    EngineFailure,
    FenceError,
    FingerprintMismatch,
    InternalError,
    InvalidRequest,
    OutOfBlocks,
    StaleEpoch,
)
from protos.contract.redis_names import InboxKind
from protos.wire import common
from workers.engine_api.types import FinishReason, LayerProgress, Phase, PrefillProgress, StepResult, TokenOut
from workers.kv_transfer.handoff_job import Ending, HandoffResult
from workers.kv_transfer.receiver import Receiver
from workers.service.arrivals import Arrivals
from workers.service.assignments import Assignment, Assignments, Part, Stage
from workers.service.engine_thread import EngineThread, StepEvent
from workers.service.failpoints import Failpoints
from workers.service.failures import Failures
from workers.service.handoff_tasks import HandoffTasks
from workers.service.membership import Membership
from workers.service.moves import Moves
from workers.service.outbox import Outbox, packed_logprobs
from workers.service.prefix_exchange import PrefixExchange
from workers.service.request_spec import ended_already, engine_request
from workers.service.retrying import while_store_is_away
from workers.service.store import InboxEntry, WorkerStore
from workers.service.task_set import TaskSet

logger = logging.getLogger(__name__)

_FINISH = {
    FinishReason.STOP: common.FINISH_REASON_STOP,
    FinishReason.LENGTH: common.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the coordinator moves."""

    me: Membership
    engine: EngineThread
    store: WorkerStore
    assignments: Assignments
    outbox: Outbox
    handoffs: HandoffTasks
    moves: Moves
    prefixes: PrefixExchange
    receiver: Receiver
    arrivals: Arrivals
    failures: Failures
    failpoints: Failpoints
    fingerprint: common.Fingerprint
    lease_s: float
    patience_s: float


class Coordinator:
    """The rules of one worker: which message or event leads to which effect."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tasks = TaskSet()

    # -- messages -------------------------------------------------------------------------------------------------------

    def on_entry(self, entry: InboxEntry) -> None:
        """One message of the inbox; told twice it has no second effect."""
        match entry.kind:
            case InboxKind.PREFILL | InboxKind.EXPECT | InboxKind.ARRIVE:
                self._on_assigned(entry)
            case InboxKind.LEND:
                self._parts.prefixes.lend(entry)
            case InboxKind.REVOKE:
                self.revoke(entry.request_id, entry.epoch)
            case InboxKind.OWNER:
                self._on_owner(entry)
            case InboxKind.MOVE:
                self._parts.moves.start(self._parts.assignments.get(entry.request_id), entry)
            case InboxKind.STAY:
                self._parts.moves.close_move(entry.request_id, entry.epoch)

    def revoke(self, request_id: str, up_to_epoch: int) -> None:
        """Drops a request up to and including this epoch, in whatever stage; older messages of it have no effect."""
        parts = self._parts
        assignment = parts.assignments.get(request_id)
        if assignment is not None and assignment.epoch <= up_to_epoch:
            self.drop(assignment)
        parts.assignments.fence(request_id, up_to_epoch)
        self._tasks.spawn(parts.arrivals.now_expected())

    def drop(self, assignment: Assignment) -> None:
        """Ends an assignment and gives everything back that it holds here."""
        parts, request_id, epoch = self._parts, assignment.request_id, assignment.epoch
        parts.assignments.end(assignment)
        parts.outbox.drop(request_id, epoch)
        if assignment.part is Part.PREFILL:
            parts.engine.post(lambda engine: engine.abort(request_id, epoch))
            parts.handoffs.cancel(assignment)
            parts.prefixes.drop(assignment)
            return
        parts.moves.cancel(assignment)
        parts.receiver.abort_request(request_id, epoch, StaleEpoch(f"{request_id}: epoch {epoch} is over"))
        parts.prefixes.drop(assignment)
        parts.engine.post(lambda engine: engine.abort(request_id, epoch))

    def drop_all(self) -> None:
        """Ends every assignment: this incarnation is fenced."""
        for assignment in self._parts.assignments.all():
            self.drop(assignment)
        self._parts.receiver.abort_all(StaleEpoch("this instance is fenced"))
        self._parts.prefixes.drop_all()

    def give_up(self, assignment: Assignment, error: AutanError, *, poison: bool = False, retryable: bool = True) -> None:
        """Drops an assignment and tells Redis why, so that it is placed again or fails."""
        logger.warning("%s at epoch %d is given up: %s", assignment.request_id, assignment.epoch, error)
        self.drop(assignment)
        self._parts.failures.report(assignment.request_id, assignment.epoch, error, poison=poison, retryable=retryable)

    async def close(self) -> None:
        """Ends what runs in the background."""
        await self._tasks.cancel()
        await self._parts.prefixes.close()

    def _on_assigned(self, entry: InboxEntry) -> None:
        parts, mine = self._parts, self._parts.me.instance_id
        if parts.assignments.is_stale(entry.request_id, entry.epoch):
            return
        if parts.assignments.get(entry.request_id, entry.epoch) is not None:
            return
        if entry.kind is InboxKind.EXPECT and entry.peer_instance == mine:
            return  # the prefill message of the same assignment says everything
        older = parts.assignments.get(entry.request_id)
        if older is not None:
            self.drop(older)
        arrives = entry.kind in (InboxKind.EXPECT, InboxKind.ARRIVE)
        part = Part.DECODE if arrives else Part.FULL if entry.peer_instance == mine else Part.PREFILL
        try:
            request = engine_request(entry, Phase.PREFILL if part is Part.PREFILL else Phase.FULL)
        except InvalidRequest as error:
            parts.assignments.fence(entry.request_id, entry.epoch)
            parts.failures.report(entry.request_id, entry.epoch, error, retryable=False)
            return
        now_s = time.monotonic()
        assignment = Assignment(
            request=request,
            part=part,
            peer_instance=entry.peer_instance,
            peer_address=entry.peer_address,
            peer_incarnation=entry.peer_incarnation,
            ingress_address=entry.ingress_address,
            queued_s=entry.queued_s,
            attempts=entry.attempts,
            capability=entry.capability,
            started_s=now_s,
            progress_s=now_s,
            is_move=entry.kind is InboxKind.ARRIVE,
        )
        parts.assignments.take(assignment)
        if part is Part.DECODE:
            self._tasks.spawn(parts.arrivals.now_expected())
            return
        parts.outbox.open(request.request_id, request.epoch, len(request.output), assignment.ingress_address)
        finish = ended_already(request, parts.engine.engine.identity.context_tokens)
        if finish is not None:
            self._on_last_token(assignment, finish)
            parts.outbox.flush()
            return
        if part is Part.PREFILL:
            parts.handoffs.start(assignment, parts.fingerprint, self)
        parts.prefixes.fetches.begin(assignment, entry)
        self._tasks.spawn(self._begin(assignment))

    async def _begin(self, assignment: Assignment) -> None:
        await self._parts.failpoints.reach("prefill.before_first_chunk")
        await self._parts.prefixes.settle(assignment)
        if assignment.ended:
            return
        assignment.progress_s = time.monotonic()
        try:
            await self._parts.engine.add(assignment.request, hand_over=assignment.part is Part.PREFILL)
        except AutanError as error:
            if not assignment.ended:
                # What the engine can never take, no other engine of this pool can.
                self.give_up(assignment, error, retryable=not isinstance(error, (InvalidRequest, OutOfBlocks)))

    def _on_owner(self, entry: InboxEntry) -> None:
        assignment = self._parts.assignments.get(entry.request_id, entry.epoch)
        if assignment is not None:
            assignment.ingress_address = entry.ingress_address
            self._parts.outbox.rehome(entry.request_id, entry.ingress_address)

    # -- engine steps ---------------------------------------------------------------------------------------------------

    def on_step(self, event: StepEvent) -> None:
        """Tokens, progress and failures of one step; everything for the ingresses leaves at its end."""
        parts, now_s = self._parts, time.monotonic()
        for stored in event.stored:
            self._send_blocks(stored, event)
        for progress in event.result.progress:
            self._on_progress(progress, event, now_s)
        if event.result.progress:
            parts.prefixes.speed.observe(event.result.batch_tokens, event.took_s)
        for token in event.result.tokens:
            self._on_token(token, event, now_s)
        for failed in event.result.failed:
            assignment = parts.assignments.get(failed.request_id, failed.epoch)
            if assignment is not None:
                error = InvalidRequest(failed.message) if failed.blame else EngineFailure(failed.message)
                self.give_up(assignment, error, poison=not failed.blame, retryable=not failed.blame)
        parts.outbox.flush()
        if parts.outbox.is_over_budget:
            self._relieve_outbox()

    def _on_progress(self, progress: PrefillProgress, event: StepEvent, now_s: float) -> None:
        assignment = self._parts.assignments.get(progress.request_id, progress.epoch)
        if assignment is None:
            return
        assignment.progress_s = now_s
        assignment.chunks, assignment.cached_tokens = progress.chunks, progress.cached_tokens
        self._send_blocks(progress, event)

    def _send_blocks(self, progress: PrefillProgress | LayerProgress, event: StepEvent) -> None:
        """The full blocks of the computed rows may go to the peer."""
        assignment = self._parts.assignments.get(progress.request_id, progress.epoch)
        blocks = event.blocks.get((progress.request_id, progress.epoch))
        if assignment is not None and blocks is not None:
            self._parts.handoffs.blocks_ready(assignment, progress.computed_tokens, blocks)

    def _on_token(self, token: TokenOut, event: StepEvent, now_s: float) -> None:
        parts = self._parts
        assignment = parts.assignments.get(token.request_id, token.epoch)
        if assignment is None:
            return
        assignment.progress_s = now_s
        if not assignment.holds:
            assignment.early.append(token)
            return
        parts.outbox.put(token.request_id, token.index, token.token_id, packed_logprobs(token))
        if assignment.stage is Stage.PREFILLING:
            self._on_first_token(assignment, token, event, now_s)
        else:
            parts.moves.on_token(assignment, token, event.blocks.get((token.request_id, token.epoch)))
        if token.finish is not None:
            self._on_last_token(assignment, token.finish)

    def arrived(self, assignment: Assignment) -> None:
        """Redis agreed that the request decodes here: what the engine sampled meanwhile counts."""
        early, assignment.early = assignment.early, []
        for token in early:
            self._on_token(token, StepEvent(StepResult()), time.monotonic())

    def _on_first_token(self, assignment: Assignment, token: TokenOut, event: StepEvent, now_s: float) -> None:
        parts = self._parts
        timeline = common.Timeline(
            queue_s=assignment.queued_s,
            prefill_s=now_s - assignment.started_s,
            prefill_chunks=assignment.chunks,
            cached_tokens=assignment.cached_tokens,
            prefill_instance=parts.me.instance_id,
            attempts=assignment.attempts,
            fetched_tokens=assignment.fetched_tokens,
            fetch_source=assignment.fetch_source,
            fetch_s=assignment.fetch_s,
        )
        if assignment.part is Part.FULL:
            timeline.decode_instance = parts.me.instance_id
        assignment.timeline = timeline
        parts.outbox.describe(token.request_id, timeline)
        if token.finish is not None:
            return
        if assignment.part is Part.FULL:
            assignment.lifecycle.move(Stage.DECODING)
            self._tasks.spawn(self._hand_to_myself(assignment))
            return
        assignment.lifecycle.move(Stage.HANDING_OVER)
        ending = Ending(
            next_token_ids=(token.token_id,),
            next_logprobs=(packed_logprobs(token),) if token.logprobs else (),
            first_output_index=token.index,
            timeline=timeline,
            prefill_ended_s=event.ended_s,
        )
        parts.handoffs.end(assignment, ending, event.blocks.get((token.request_id, token.epoch), ()))

    def _on_last_token(self, assignment: Assignment, finish: FinishReason) -> None:
        parts = self._parts
        assignment.lifecycle.move(Stage.FINISHED)
        parts.outbox.finish(assignment.request_id, _FINISH[finish])
        if assignment.timeline is not None:
            parts.outbox.describe(assignment.request_id, assignment.timeline)
        if assignment.part is Part.PREFILL:
            parts.handoffs.cancel(assignment)
        parts.moves.cancel(assignment)

    async def _hand_to_myself(self, assignment: Assignment) -> None:
        parts = self._parts
        me, lease_s = parts.me, parts.lease_s
        request_id, epoch = assignment.request_id, assignment.epoch
        try:
            await while_store_is_away(
                lambda: parts.store.handoff(request_id, epoch, me.instance_id, me.number, lease_s), parts.patience_s
            )
        except FenceError:
            # A request that ended meanwhile needs no holder; a revoked one is dropped by its message or the next beat.
            logger.info("%s at epoch %d was over before it was this instance's to decode", request_id, epoch)
        except AutanError as error:
            if not assignment.ended:
                self.give_up(assignment, error)

    def _relieve_outbox(self) -> None:
        longest = self._parts.outbox.longest()
        assignment = self._parts.assignments.get(*longest) if longest else None
        if assignment is not None:
            self.give_up(assignment, InternalError("no ingress takes the tokens: the outbox is full"))

    # -- outcomes -------------------------------------------------------------------------------------------------------

    def handed_over(self, assignment: Assignment, result: HandoffResult) -> None:
        """The peer decodes and delivers from here on."""
        logger.info(
            "%s at epoch %d handed over: %d blocks, %d bytes, %.4f s exposed",
            assignment.request_id, assignment.epoch, result.blocks, result.bytes, result.exposed_s,
        )  # fmt: skip
        self._end_sending(assignment)

    def handoff_overtaken(self, assignment: Assignment, error: AutanError) -> None:
        """Somebody else decides what becomes of the request."""
        logger.info("the hand-off of %s was overtaken: %s", assignment.request_id, error)
        self._end_sending(assignment)

    def handoff_failed(self, assignment: Assignment, error: AutanError) -> None:
        """Computed again elsewhere; a pair that does not serve the same thing would only fail again."""
        if not assignment.ended:
            self.give_up(assignment, error, retryable=not isinstance(error, FingerprintMismatch))

    def finished(self, request_id: str, epoch: int) -> None:
        """The ingress has made the request terminal."""
        assignment = self._parts.assignments.get(request_id, epoch)
        if assignment is not None:
            self.drop(assignment)

    def lost(self, request_id: str, epoch: int) -> None:
        """Redis says that the request is not this instance's at this epoch."""
        assignment = self._parts.assignments.get(request_id, epoch)
        parts = self._parts
        if assignment is None or parts.handoffs.is_ending(assignment) or parts.moves.is_settling(assignment):
            return
        self.drop(assignment)

    def moved(self, assignment: Assignment) -> None:
        """The target of a move decodes and delivers from here on."""
        self._end_sending(assignment)

    def _end_sending(self, assignment: Assignment) -> None:
        if not assignment.ended:
            self._parts.assignments.end(assignment)
            self._parts.outbox.drop(assignment.request_id, assignment.epoch)

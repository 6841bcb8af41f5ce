"""Time to first token and time per token of a service that a fixed number of clients keeps busy.

A closed loop: `concurrency` clients each send a prompt, read the whole answer and send the next. Engines compute in steps:
every running request advances by one token a step, and a step also takes up to `chunk_tokens` of waiting prompts. So the
loop is best counted in steps, not in seconds:

* a request passes R steps with its prompt and one step for each token of its answer, so `rate = running / (R + answer)`
  prompts enter a step on average, and a step takes `decode step + rate x what a prompt adds`: the time per token;
* prompts wait only when a step has no room for them. The queue is that of N customers at one server that takes
  `prompt / chunk` steps for each, who come back after `answer` steps. Schweitzer's approximation of it is a quadratic;
* prompts that started together end together and meet again: a prompt shares its step with some of the others (`convoy`);
* the first answers of a run begin with all prompts at once: one of some ten waves (`first_wave`) waits for half of them.

This is why time to first token stays moderate in overload while time per token grows: steps get longer, queues do not.
Where the cache holds fewer requests than there are clients, the rest wait for a place, which Little's law prices.
All fields may be arrays: many points at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.costs.batch import Chunk, Decodes, StepBatch
from orchestrator.costs.constants import Constants
from orchestrator.costs.number import Number, larger, smaller
from orchestrator.costs.shape import RankShape
from orchestrator.costs.step import EngineCosts, step_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal instances of one role. `places` is how many requests the cache of one data-parallel group holds."""

    shape: RankShape
    instances: Number
    places: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """A deployment under a fixed number of clients. With `split` prompts are computed in `prefill` and handed over."""

    prefill: Pool
    decode: Pool
    split: Number  # 1: two pools; 0: one pool does both, and `prefill` is it
    prompt_tokens: Number
    output_tokens: Number
    concurrency: Number
    chunk_tokens: Number
    spread: Number  # 1: lengths differ from request to request; 0: all are equal
    sequence_limit: Number  # requests that an engine runs at a time, whatever its memory
    engine: EngineCosts
    first_token_s: Number
    first_wave: Number  # share of the requests whose prompts meet those of all other clients
    handoff_s: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPoint:
    """Means over requests, and what explains them."""

    ttft_s: Number
    tpot_s: Number
    decode_step_s: Number
    prefill_s: Number  # what a prompt adds to the steps it rides on
    running: Number  # requests of one data-parallel group that decode at a time
    saturated: Number  # clients beyond what the caches hold, as a share of them


def predict(loop: ClosedLoop, constants: Constants) -> ServingPoint:
    """The point at which the loop settles. Raises ImpossiblePrediction when a step exceeds a peak of the GPU."""
    groups = loop.decode.instances * loop.decode.shape.data
    clients = larger(loop.concurrency / groups, 1.0)
    running = smaller(clients, smaller(loop.decode.places, loop.sequence_limit))
    chunks = loop.prompt_tokens / loop.chunk_tokens
    prompt_steps = _response(chunks, loop.output_tokens, running)
    decoding = larger(running * loop.output_tokens / (prompt_steps + loop.output_tokens), 1.0)
    step = _decode_step(loop, decoding, constants)
    extra = _prompt_seconds(loop, decoding, step, constants)
    shared = _shared(loop, running, prompt_steps, step, extra, constants)
    apart = _apart(loop, running, step, extra, constants)
    decoding = _where(loop.split, apart.decoding, decoding)
    step = _where(loop.split, _decode_step(loop, decoding, constants), step)
    tpot = step + _where(loop.split, 0.0, shared.carried_s)
    ttft = loop.first_token_s + _where(loop.split, apart.first_s, shared.first_s)
    waiting = larger(clients - running, 0.0) / running * (ttft + loop.output_tokens * tpot)
    return ServingPoint(
        ttft_s=ttft + waiting,
        tpot_s=tpot,
        decode_step_s=step,
        prefill_s=extra,
        running=decoding,
        saturated=larger(clients - running, 0.0) / clients,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    carried_s: Number  # prompts of others in a step, on average
    first_s: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class _Apart:
    decoding: Number
    first_s: Number


def _shared(
    loop: ClosedLoop, running: Number, prompt_steps: Number, step: Number, extra: Number, constants: Constants
) -> _Shared:
    """One pool computes prompts and answers."""
    others = running - 1.0
    carried = others / (prompt_steps + loop.output_tokens) * extra * (1.0 - loop.first_wave / 2.0)
    chunks = loop.prompt_tokens / loop.chunk_tokens
    wait_steps = _waiting(prompt_steps - chunks, running * chunks - loop.output_tokens - chunks, constants)
    met = 1.0 + _convoy(loop, constants) * others / running
    burst = loop.first_wave * extra * others / 2.0
    return _Shared(carried_s=carried, first_s=step + extra * met + wait_steps * (step + carried) + burst)


def _apart(loop: ClosedLoop, running: Number, step: Number, extra: Number, constants: Constants) -> _Apart:
    """A pool for prompts, c servers as one that is c times as fast, before the one for answers."""
    servers = loop.prefill.instances * loop.prefill.shape.data
    service = extra / servers
    answer_s = loop.output_tokens * step
    exponential = _response(service, answer_s, loop.concurrency) - service
    wait = _waiting(exponential, loop.concurrency * service - answer_s - service, constants)
    burst = loop.first_wave * service * larger(loop.concurrency - servers, 0.0) / 2.0
    met = 1.0 + _convoy(loop, constants) * larger(loop.concurrency - servers, 0.0) / loop.concurrency
    first = extra * met + wait + burst + loop.handoff_s + step
    return _Apart(decoding=larger(running * answer_s / (answer_s + first), 1.0), first_s=first)


def _waiting(exponential: Number, saturated: Number, constants: Constants) -> Number:
    """A share of what exponential service would wait, but no less than a saturated server makes everyone wait."""
    return larger(larger(constants["queueing"] * exponential, saturated), 0.0)


def _convoy(loop: ClosedLoop, constants: Constants) -> Number:
    """How many of the others' prompts share a step with one: chance where lengths differ, habit where they are equal."""
    room = 1.0 - smaller(loop.prompt_tokens / loop.chunk_tokens, 1.0)
    return _where(loop.spread, constants["convoy_spread"] * room, constants["convoy_equal"])


def _decode_step(loop: ClosedLoop, sequences: Number, constants: Constants) -> Number:
    batch = StepBatch(decodes=(Decodes(sequences=sequences, context=loop.prompt_tokens + loop.output_tokens / 2.0),))
    return step_cost(loop.decode.shape, batch, constants, loop.engine).checked().seconds


def _prompt_seconds(loop: ClosedLoop, sequences: Number, step: Number, constants: Constants) -> Number:
    """Seconds that one prompt adds: in a shared pool to the decode steps it rides on, else its own steps."""
    chunks = larger(loop.prompt_tokens / loop.chunk_tokens, 1.0)
    new = loop.prompt_tokens / chunks
    chunk = Chunk(sequences=1.0, new=new, cached=(loop.prompt_tokens - new) / 2.0, ends=1.0 / chunks)
    alone = step_cost(loop.prefill.shape, StepBatch(chunks=(chunk,)), constants, loop.engine).checked().seconds
    context = loop.prompt_tokens + loop.output_tokens / 2.0
    riding = StepBatch(chunks=(chunk,), decodes=(Decodes(sequences=sequences, context=context),))
    mixed = step_cost(loop.decode.shape, riding, constants, loop.engine).checked().seconds
    return chunks * _where(loop.split, alone, mixed - step)


def _response(service: Number, think: Number, customers: Number) -> Number:
    """Mean time at a server, waiting and service, of customers who come back after `think`: R^2 + R (Z - S N) - S Z = 0."""
    slack = service * customers - think
    found: Number = (slack + np.sqrt(slack * slack + 4.0 * service * think)) / 2.0
    return found


def _where(condition: Number, then: Number, otherwise: Number) -> Number:
    found: Number = condition * then + (1.0 - condition) * otherwise
    return found

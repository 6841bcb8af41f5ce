"""How long one engine step takes: a roofline for each operator, and what no roofline shows.

An operator's time combines the time of its bytes and the time of its FLOPs at the fractions of the peaks that kernels
achieve: `(memory^p + compute^p)^(1/p)`, between the larger of the two (full overlap, p infinite) and their sum (p = 1).
Beside the operators stand the sums and exchanges between GPUs, the launches of kernels and the work of the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from orchestrator.costs.batch import StepBatch
from orchestrator.costs.constants import Constants
from orchestrator.costs.coverage import covered
from orchestrator.costs.number import Number, larger, largest, smaller
from orchestrator.costs.shape import UNLIMITED, Experts, Linear, RankShape
from protos.contract.errors import ImpossiblePrediction

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One part of a step on one GPU. FLOPs and bytes are what has to be done, not what kernels waste."""

    name: str
    seconds: Number
    flops: Number = 0.0
    bytes: Number = 0.0
    peak_flops: Number = 1.0
    link_bytes: Number = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The time of a step, the operators it consists of, and what they imply about the hardware."""

    operators: tuple[Operator, ...]
    memory_bytes_per_s: Number
    link_bytes_per_s: Number

    @property
    def seconds(self) -> Number:
        """The whole step."""
        found: Number = 0.0
        for operator in self.operators:
            found = found + operator.seconds
        return found

    @property
    def flops_fraction(self) -> Number:
        """Share of the step that its FLOPs would take at the peaks of their formats."""
        found: Number = 0.0
        for operator in self.operators:
            found = found + operator.flops / operator.peak_flops
        return found / self.seconds

    @property
    def memory_fraction(self) -> Number:
        """Share of the step that its bytes would take at the peak of the memory."""
        found: Number = 0.0
        for operator in self.operators:
            found = found + operator.bytes
        return found / self.memory_bytes_per_s / self.seconds

    def checked(self) -> StepCost:
        """This cost. Raises ImpossiblePrediction when an operator, or the whole, exceeds a peak."""
        for one in self.operators:
            ideal = larger(one.flops / one.peak_flops, one.bytes / self.memory_bytes_per_s)
            ideal = larger(ideal, one.link_bytes / self.link_bytes_per_s)
            excess = largest(ideal - one.seconds * (1.0 + TOLERANCE))
            if not excess <= 0.0:
                raise ImpossiblePrediction(
                    f"operator {one.name}: predicted {excess:.3g} s faster than the peaks of the GPU allow; "
                    "check units and constants"
                )
        worst = max(largest(self.flops_fraction), largest(self.memory_fraction))
        if not worst <= 1.0 + TOLERANCE:
            raise ImpossiblePrediction(f"step: implies {worst:.3g} of a peak of the GPU; check units and constants")
        return self


def step_cost(shape: RankShape, batch: StepBatch, constants: Constants, engine: EngineCosts) -> StepCost:
    """The cost of one step on one GPU of an instance. All numbers may be arrays. See StepCost.checked for the refusal."""
    rates = shape.rates
    rows = batch.tokens
    operators = (
        _linear("linear", shape.compressed, rows, shape, constants, rates.linear_flops, rates.linear_achieved),
        _linear("linear_bf16", shape.plain, rows, shape, constants, rates.bf16_flops, rates.bf16_achieved),
        _linear("head", shape.head, batch.sampled, shape, constants, rates.bf16_flops, rates.bf16_achieved),
        *_experts(shape, rows, constants),
        *_attention(shape, batch, constants),
        _state(shape, batch, constants),
        _activations(shape, rows, constants),
        _collectives(shape, rows, constants),
        Operator(name="launch", seconds=shape.kernels * engine.kernel_s),
        Operator(name="routing", seconds=_expert_layers(shape) * engine.route_s),
        Operator(name="host", seconds=engine.step_s + engine.sequence_s * batch.sequences),
    )
    return StepCost(operators=operators, memory_bytes_per_s=rates.memory_bytes_per_s, link_bytes_per_s=rates.link_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCosts:
    """What a serving engine adds to the operators."""

    step_s: Number  # of the host for a step, while the GPU waits
    sequence_s: Number  # of the host for each sequence of a step
    kernel_s: Number  # between two kernels
    route_s: Number  # of a layer of experts: choosing, sorting, weighing


def engine_costs(constants: Constants, backend: str) -> EngineCosts:
    """Of a serving engine, by name."""
    return EngineCosts(**{field.name: constants.of_backend(f"engine_{field.name}", backend) for field in fields(EngineCosts)})


def _expert_layers(shape: RankShape) -> Number:
    found: Number = 0.0
    for one in shape.experts:
        found = found + one.layers
    return found


def overlapped(memory_s: Number, compute_s: Number, power: float) -> Number:
    """Time of an operator whose bytes and FLOPs overlap to a degree; never below either."""
    found: Number = (memory_s**power + compute_s**power) ** (1.0 / power)
    return found


def _linear(
    name: str, linear: Linear, rows: Number, shape: RankShape, constants: Constants, peak: Number, achieved: Number
) -> Operator:
    flops = 2.0 * linear.params * rows
    memory = linear.bytes / (shape.rates.memory_bytes_per_s * shape.rates.memory_achieved * constants["weight_memory"])
    compute = flops / (peak * achieved * constants["gemm_compute"])
    return Operator(
        name=name,
        seconds=overlapped(memory, compute, constants["overlap_power"]),
        flops=flops,
        bytes=linear.bytes,
        peak_flops=peak,
    )


def _experts(shape: RankShape, rows: Number, constants: Constants) -> list[Operator]:
    rates = shape.rates
    met = rows * shape.data  # tokens of all data-parallel groups reach the experts
    found = []
    for one in shape.experts:
        held = covered(one.experts, one.picks, met) / one.groups
        size = one.layers * held * one.expert_bytes
        flops = 2.0 * one.layers * met * one.picks / one.groups * one.expert_params
        memory = size / (rates.memory_bytes_per_s * rates.memory_achieved * constants["expert_memory"])
        tile = one.layers * held * constants["expert_tile_rows"] * one.expert_params
        compute = (flops + smaller(2.0 * tile, flops)) / (
            rates.expert_flops * rates.expert_achieved * constants["expert_compute"]
        )
        seconds = overlapped(memory, compute, constants["overlap_power"]) * _imbalance(one, constants)
        found.append(Operator(name="experts", seconds=seconds, flops=flops, bytes=size, peak_flops=rates.expert_flops))
    return found


def _imbalance(one: Experts, constants: Constants) -> Number:
    """The busiest group against the mean, when there are several."""
    return 1.0 + (constants["expert_imbalance"] - 1.0) * (1.0 - 1.0 / one.groups)


def _attention(shape: RankShape, batch: StepBatch, constants: Constants) -> list[Operator]:
    rates = shape.rates
    bandwidth = rates.memory_bytes_per_s * rates.memory_achieved * constants["attention_memory"]
    speed = rates.bf16_flops * rates.attention_achieved * constants["attention_compute"]
    found = []
    for one in shape.attention:
        for chunk in batch.chunks:
            flops = one.prefill_flops_per_pair * chunk.pairs(one.limit_tokens)
            flops = flops + one.index_flops_per_pair * chunk.pairs(UNLIMITED)
            size = one.kv_bytes_per_token * (chunk.keys(one.limit_tokens) + chunk.tokens)
            seconds = overlapped(size / bandwidth, flops / speed, constants["overlap_power"])
            found.append(
                Operator(name="attention_prefill", seconds=seconds, flops=flops, bytes=size, peak_flops=rates.bf16_flops)
            )
        for decodes in batch.decodes:
            keys = decodes.keys(one.limit_tokens)
            queries = 1.0 + batch.drafted
            flops = one.decode_flops_per_pair * keys * queries
            flops = flops + one.index_flops_per_pair * decodes.keys(UNLIMITED) * queries
            size = one.kv_bytes_per_token * (keys + decodes.sequences) + one.index_bytes_per_token * decodes.keys(UNLIMITED)
            seconds = overlapped(size / bandwidth, flops / speed, constants["overlap_power"])
            found.append(
                Operator(name="attention_decode", seconds=seconds, flops=flops, bytes=size, peak_flops=rates.bf16_flops)
            )
    return found


def _state(shape: RankShape, batch: StepBatch, constants: Constants) -> Operator:
    """Recurrent blocks: a state is read and written once for each sequence of the step."""
    rates = shape.rates
    size = 2.0 * shape.state_bytes * batch.sequences
    flops = shape.state_flops_per_token * batch.tokens
    memory = size / (rates.memory_bytes_per_s * rates.memory_achieved * constants["attention_memory"])
    compute = flops / (rates.bf16_flops * rates.attention_achieved * constants["attention_compute"])
    seconds = overlapped(memory, compute, constants["overlap_power"])
    return Operator(name="state", seconds=seconds, flops=flops, bytes=size, peak_flops=rates.bf16_flops)


def _activations(shape: RankShape, rows: Number, constants: Constants) -> Operator:
    size = shape.activation_bytes_per_token * rows
    seconds = size / (shape.rates.memory_bytes_per_s * shape.rates.memory_achieved)
    return Operator(name="activations", seconds=seconds * constants["activation_passes"])


def _collectives(shape: RankShape, rows: Number, constants: Constants) -> Operator:
    """Sums over the tensor group after mixers and feed-forward layers; with data groups, the experts' exchanges.

    A group on several nodes sums within the node first, then each GPU its part across nodes, over its own network card.
    """
    rates = shape.rates
    link = rates.link_bytes_per_s * rates.link_achieved * constants["link"]
    nic = rates.nic_bytes_per_s * rates.nic_achieved
    others = shape.tensor * shape.data
    tensor_nodes = larger(shape.tensor / rates.gpus_per_domain, 1.0)
    nodes = larger(others / rates.gpus_per_domain, 1.0)
    local = shape.tensor / tensor_nodes
    row_bytes = rows * shape.hidden * 2.0
    sums = shape.reductions * 2.0 * (local - 1.0) / local * row_bytes
    sums_across = shape.reductions * 2.0 * (tensor_nodes - 1.0) / tensor_nodes * row_bytes / local
    sent = shape.exchanges * rows * shape.exchange_bytes_per_token * 1.5
    sent_across = sent * (1.0 - 1.0 / nodes)
    sent_local = sent * (1.0 / nodes - 1.0 / others)
    starts = shape.reductions * (constants["reduction_s"] + constants["across_s"] * smaller(tensor_nodes - 1.0, 1.0))
    starts = starts + shape.exchanges * (constants["exchange_s"] + constants["across_s"] * smaller(nodes - 1.0, 1.0))
    seconds = starts + (sums + sent_local) / link + (sums_across + sent_across) / nic
    return Operator(name="collectives", seconds=seconds, link_bytes=sums + sent_local)

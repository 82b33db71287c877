"""Time of a step on a machine that was measured, from the figures of ``machine`` and the cores that ranks share.

    products      by shape, forward and both backward           attention    by heads x T x T x K
    rest          norms, rotary, activation, calls               loss         by tokens x vocabulary
    operation     what the runtime adds to each                  collectives  by name, ranks and bytes
    ─────────────────────────────► operations of the schedule, played on the cores (``contention``)
                                   + gradients and parameters over the data ranks, unit by unit
                                   + norm, clipping and update, and what a step takes besides

Nothing here is fitted to steps of training: blocks, calls and messages are measured one by one.  What traces of runs
correct (``refine``) are factors on these figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import hypot
from typing import TYPE_CHECKING

from stretto.planner import refinement, video
from stretto.planner.barrier import barrier
from stretto.planner.contention import Contended, contended
from stretto.planner.flops import keys_per_query
from stretto.planner.linear_layers import gates, mean, measured_seconds, of_stages
from stretto.planner.machine import Machine, rest_elements
from stretto.planner.profile import Key, check_shape, schedule_key, scheduled
from stretto.schedule.op import Kind
from stretto.spec.errors import UnsupportedError
from stretto.spec.front import fills

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stretto.planner.step import StepTime
    from stretto.planner.workload import Workload
    from stretto.schedule.schedule import Schedule

SUMS = 3
"""Sums over tp of a figure per token that the loss is made of."""
REGIONS = 4
"""Exchanges over tp of a layer in each direction: each of its two regions gathers and scatters."""
SMALL_BYTES = 64
"""Of what ranks agree on besides tensors: counts, norms, the wish to stop."""
AGREEMENTS = 3
"""Times that they do in a step."""
ADAM_ACCESSES = 10
"""Times that an update with norm and clipping, as it was measured, reads or writes a figure for each parameter."""
MODEL_ERROR = 0.12
"""Relative error of a step that was put together from parts, beside the spread of the parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Seconds of one layer and micro-batch, without contention."""

    forward: float
    inputs: float
    """Gradients of inputs."""
    weights: float
    """Gradients of weights."""
    waits: float
    """For other ranks of tp and cp, in each direction."""


def layer(work: Workload, machine: Machine) -> Layer:
    """One layer of ``work``, with what its plan recomputes; on average, where they differ."""
    if len(set(work.model.attention)) > 1:
        return Layer(
            forward=mean(work, lambda one: layer(one, machine).forward),
            inputs=mean(work, lambda one: layer(one, machine).inputs),
            weights=mean(work, lambda one: layer(one, machine).weights),
            waits=mean(work, lambda one: layer(one, machine).waits),
        )
    products, attention = product_seconds(work, machine), attention_seconds(work, machine)
    elements = elements_of(work)
    forward = products[0] + attention[0] + machine.rest_forward.at(elements)
    inputs = products[1] + attention[1] + machine.rest_backward.at(elements)
    if work.plan.recompute == "full":
        inputs += forward
    elif work.plan.recompute == "selective":
        inputs += attention[0]
    size = layer_size(work)
    return Layer(
        forward=forward * machine.factor("forward", size),
        inputs=inputs * machine.factor("inputs", size),
        weights=products[2] * machine.factor("weights", size),
        waits=_waits(work, machine) * machine.factor("exchange", exchanged_bytes(work)),
    )


def layer_size(work: Workload) -> float:
    """Operations of a layer's products one way, on one rank: what refinements of its work are told apart by."""
    return 2.0 * work.tokens * sum(inputs * outputs for inputs, outputs in _shapes(work))


def head_size(work: Workload) -> float:
    """Operations of the logits one way, on one rank."""
    return 2.0 * work.tokens * work.model.hidden_size * work.model.num_outputs / work.plan.tp


def exchanged_bytes(work: Workload) -> float:
    """Bytes of a layer's activations on the ranks of tp and cp, which they exchange in parts."""
    return work.tokens * work.plan.cp * work.model.hidden_size * work.stack.parameter_bytes


def product_seconds(work: Workload, machine: Machine) -> tuple[float, float, float]:
    """Products of a layer: forward, gradients of inputs, gradients of weights."""
    tokens = max(1, round(work.tokens))
    sums = [0.0, 0.0, 0.0]
    for inputs, outputs in _shapes(work):
        sums[0] += machine.product(tokens, outputs, inputs)
        sums[1] += machine.product(tokens, inputs, outputs)
        sums[2] += machine.product(outputs, inputs, tokens)
    if work.model.video is not None:  # the modulation, of clips and not of tokens
        clips, width = work.plan.micro_batch_size, work.model.hidden_size
        sums[0] += machine.product(clips, video.MODULATED * width, width)
        sums[1] += machine.product(clips, width, video.MODULATED * width)
        sums[2] += machine.product(video.MODULATED * width, width, clips)
    return sums[0], sums[1], sums[2]


def attention_seconds(work: Workload, machine: Machine) -> tuple[float, float]:
    """Forward and backward of a layer's attention on one rank, under the mask that packed documents need."""
    model, length = work.model, work.sequence_length
    if model.keeps_states:
        return measured_seconds(work, machine)
    heads = model.num_heads * work.plan.micro_batch_size / work.plan.tp / work.plan.cp
    keys = length if model.video is None else keys_per_query(model, length)
    operations = heads * length * keys * model.head_size
    return machine.attention_forward.at(operations), machine.attention_backward.at(operations)


def elements_of(work: Workload) -> float:
    """What the rest of a layer works on, on one rank."""
    model, tp = work.model, work.plan.tp
    if model.video is not None:  # three parts instead of two, each with a gate
        return rest_elements(work.tokens, video.REST * model.hidden_size, model.intermediate_size)
    ups = 1 if model.family == "gpt2" else 2
    split = (model.num_heads + 2 * model.kv_heads) * model.head_size + (1 + ups) * model.intermediate_size
    return rest_elements(work.tokens, model.hidden_size / tp, split / tp)


def head(work: Workload, machine: Machine) -> tuple[float, float, float]:
    """Logits and loss: forward, gradients of inputs, gradients of weights."""
    tokens, width = max(1, round(work.tokens)), work.model.hidden_size
    vocabulary = -(-work.model.num_outputs // work.plan.tp)
    logits, times = tokens * vocabulary, machine.factor("head", head_size(work))
    return (
        times * (machine.product(tokens, vocabulary, width) + machine.loss_forward.at(logits)),
        times * (machine.product(tokens, width, vocabulary) + machine.loss_backward.at(logits)),
        times * machine.product(vocabulary, width, tokens),
    )


def turn(work: Workload, machine: Machine) -> tuple[float, float]:
    """Seconds of one layer and of the head, there and back: what stages are balanced by."""
    one = layer(work, machine)
    alive, weights = (sum(layers) / work.model.num_layers for layers in (work.backward_layers, work.weight_layers))
    return one.forward + alive * one.inputs + weights * one.weights + 2 * one.waits, sum(head(work, machine))


def measured_step(work: Workload, machine: Machine) -> StepTime:
    """A whole step; UnsupportedError for schedules that can't be followed on shared cores."""
    from stretto.planner.step import StepTime

    plan = work.plan
    if plan.ep > 1:
        raise UnsupportedError("The time of plan.ep isn't estimated yet; estimate the plan without it.")
    if plan.offload:
        raise UnsupportedError("The time of plan.offload on shared cores isn't estimated yet; estimate it without.")
    around = played(work, machine)
    whole, busiest = around.makespan if barrier(work) else around.span, around.busiest
    whole *= machine.factor("waiting", plan.pp)
    busiest = min(busiest, whole)
    layers = work.num_microbatches * max(work.layers_of_rank(rank) for rank in range(plan.pp)) / work.num_replicas
    waited = 2 * layers * layer(work, machine).waits
    time = StepTime(
        work=busiest,
        tensor_communication=waited if plan.cp == 1 else 0.0,
        context_communication=waited if plan.cp > 1 else 0.0,
        bubble=max(0.0, whole - busiest),
        data_communication=data_seconds(work, machine),
        optimizer=sum(update_seconds(work, machine)),
    )
    return replace(time, expected_error=_expected_error(work, machine, time))


def played(
    work: Workload,
    machine: Machine,
    *,
    schedule: Schedule | None = None,
    taken: dict[tuple[Kind, int], list[float]] | None = None,
) -> Contended:
    """The operations of a step on the machine's cores.

    ``schedule``: None for the plan's.  ``taken`` is filled with how long each operation took, by kind and stage, beside
    the others on the same cores.
    """
    seconds, waits = _operations(work, machine, layer(work, machine))
    alike = work.plan.num_ranks // work.plan.pp
    return contended(
        schedule or schedule_of(work),
        seconds,
        waits=waits,
        message=message_seconds(work, machine),
        slowdown=lambda ranks: machine.slowdown(alike * ranks),
        taken=taken,
    )


def message_seconds(work: Workload, machine: Machine) -> float:
    """One message between two stages."""
    size = message_bytes(work)
    return machine.messages.at(size) * machine.factor("message", size) if work.plan.pp > 1 else 0.0


def update_seconds(work: Workload, machine: Machine) -> tuple[float, float]:
    """The update of the fullest rank, and what a step takes besides; all ranks are at it at once."""
    ranks, held = work.plan.num_ranks, updated_parameters(work)
    crowd = machine.slowdown(ranks)
    # Norm and clipping read and write the gradient, the update reads it, and reads and writes weight and moments.
    accesses = 6 + 2 * (work.stack.optimizer_bytes - work.stack.master_bytes) / work.stack.gradient_bytes
    update = machine.optimizer.at(held) * machine.factor("optimizer", held) * accesses / ADAM_ACCESSES
    return crowd * update, crowd * machine.step_seconds * machine.factor("step", ranks)


def updated_parameters(work: Workload) -> float:
    """What the rank with most of them updates."""
    return work.largest_trained / work.states.optimizer


def _expected_error(work: Workload, machine: Machine, time: StepTime) -> float:
    """Each cause by its own refinement; what no run near it has told is as unsure as before."""
    before = hypot(MODEL_ERROR, machine.spread)
    if not machine.refinements:
        return before

    def of(kind: str, size: float) -> float:
        return refinement.error(machine.refinements, kind, size, unrefined=before)

    size = layer_size(work)
    ways = [of(kind, size) for kind in ("forward", "inputs", "weights")]
    causes = (
        (time.work + time.bubble, max(ways)),
        (time.data_communication, of("collectives", unit_bytes(work))),
        (time.optimizer, of("optimizer", updated_parameters(work))),
    )
    return sum(seconds * wrong for seconds, wrong in causes) / time.total


def data_seconds(work: Workload, machine: Machine) -> float:
    """Gradients and parameters over the data ranks unit by unit, and what all ranks agree on.

    A unit is a layer or an end of the model.  On cores that ranks share nothing is hidden: copying messages is work.
    """
    plan, stack, states = work.plan, work.stack, work.states
    if plan.num_ranks == 1:
        return 0.0
    seconds = AGREEMENTS * machine.collective("all_reduce", plan.num_ranks, SMALL_BYTES)
    units, times = _units(work), machine.factor("collectives", unit_bytes(work))
    held, trains = work.largest_share / units, work.largest_trained / units
    ranks = plan.dp * plan.cp * work.num_replicas

    def over(name: str, size: int, num_bytes: float) -> float:
        return units * machine.collective(name, size, num_bytes) if size > 1 else 0.0

    if plan.tp > 1:
        seconds += over("all_reduce", plan.tp, 2 * work.model.hidden_size * stack.gradient_bytes)

    def scattered(small: int, large: int) -> float:
        return over("reduce_scatter", large // small, trains * stack.reduction_bytes / small)

    def gathered(small: int, large: int) -> float:
        return over("all_gather", large // small, held * stack.parameter_bytes / small)

    p, g, o = states.parameters, states.gradients, states.optimizer
    each = 2 * gathered(1, p) + scattered(1, p) + scattered(p, g)
    summed = over("all_reduce", ranks // o, trains * stack.reduction_bytes / o)
    once = scattered(g, o) + summed + gathered(g, o) + gathered(p, g)
    return times * (seconds + work.num_microbatches * each + once)


def unit_bytes(work: Workload) -> float:
    """Bytes of the gradients that ranks sum at a time, a layer's or an end's."""
    return work.largest_trained / _units(work) * work.stack.reduction_bytes


def _units(work: Workload) -> int:
    """What gradients are summed in: layers, and an end of the model."""
    return max(work.layers_of_rank(rank) for rank in range(work.plan.pp)) + 1


def _shapes(work: Workload) -> tuple[tuple[int, int], ...]:
    """Inputs and outputs of a layer's weights on one tp rank."""
    model, tp = work.model, work.plan.tp
    if model.video is not None:
        return video.shapes(model)
    width, inner = model.hidden_size, -(-model.intermediate_size // tp)
    queries, keys = -(-model.num_heads * model.head_size // tp), -(-model.kv_heads * model.head_size // tp)
    ups, gated = 1 if model.family == "gpt2" else 2, -(-gates(model) // tp)
    found = (*(((width, inner),) * ups), (inner, width), *(((width, gated),) if gated else ()))
    return (width, queries), (width, keys), (width, keys), (queries, width), *found


def _waits(work: Workload, machine: Machine) -> float:
    """Seconds in which a layer waits for ranks of tp and cp, each way."""
    plan, model, width = work.plan, work.model, work.stack.parameter_bytes
    seconds = 0.0
    if plan.tp > 1:
        seconds += REGIONS * machine.collective("exchange", plan.tp, work.tokens * model.hidden_size * width)
    if plan.cp > 1 and model.video is not None:
        again = 1.5 if plan.recompute == "full" else 1.0  # half of it in each direction
        once = machine.collective("exchange", plan.cp, work.tokens * plan.cp * model.hidden_size * width)
        seconds += again * video.switches(work) * once
    elif plan.cp > 1 and model.keeps_states:
        shares = 2 if plan.context_layout == "zigzag" else 1
        heads = plan.micro_batch_size * model.kv_heads / plan.tp * max(4.0, width)
        seconds += machine.collective("all_gather", plan.cp, plan.cp * shares * heads * model.head_size**2)
    elif plan.cp > 1:
        keys = 2 * model.kv_heads * model.head_size / plan.tp * work.tokens * width
        seconds += machine.collective("exchange", plan.cp, keys * plan.cp)
    return seconds


def ends(work: Workload, machine: Machine) -> tuple[float, float]:
    """Seconds in which the embedding and the head wait for ranks of tp, each way."""
    width = work.stack.parameter_bytes
    once = machine.collective("exchange", work.plan.tp, work.tokens * work.model.hidden_size * width)
    return once, once + SUMS / 2 * machine.collective("all_reduce", work.plan.tp, work.tokens * width)


def _operations(work: Workload, machine: Machine, one: Layer) -> tuple[dict[Kind, list[float]], ...]:
    """Work and waits of each kind of operation, per stage."""
    call, last, size = machine.operation_seconds, head(work, machine), layer_size(work)
    gaps = call * machine.factor("gaps", work.plan.num_ranks)
    calls = [gaps + call * machine.factor(kind, size) for kind in ("forward", "inputs", "weights")]

    def of(name: str, layers: Sequence[float]) -> list[float]:
        return of_stages(work, lambda kind: getattr(one if kind is work else layer(kind, machine), name), layers)

    forward = [calls[0] + seconds for seconds in of("forward", work.layers)]
    inputs = [calls[1] + seconds for seconds in of("inputs", work.backward_layers)]
    weights = of("weights", work.weight_layers)
    if work.plan.compile == "blocks":  # layers that are compiled as a whole do all of their backward in I
        inputs, weights = [a + b for a, b in zip(inputs, weights, strict=True)], [0.0] * len(weights)
    for column, seconds in zip((forward, inputs, weights), last, strict=True):
        column[-1] += seconds
    both = [one + two for one, two in zip(inputs, weights, strict=True)]
    work_of = {Kind.F: forward, Kind.R: forward, Kind.B: both, Kind.I: inputs}
    waits = [one.waits * layers for layers in work.layers]
    if work.plan.tp > 1:
        first, final = ends(work, machine)
        waits[0] += first
        waits[-1] += final
    if fills(work.plan):  # a frozen stage for each layer in front, or for the embedding alone, and the landing
        layers = [1.0] * work.ahead or [0.0]
        forward += [*(calls[0] + one.forward * number for number in layers), 0.0]
        waits += [*(one.waits * number for number in layers), 0.0]
    slow = {Kind.F: waits, Kind.R: waits, Kind.B: waits, Kind.I: waits}
    return {**work_of, Kind.W: [calls[2] + second for second in weights]}, slow


def message_bytes(work: Workload) -> float:
    """Of a message between two stages, from one rank to one other."""
    return work.tokens * work.model.hidden_size * work.stack.parameter_bytes / work.plan.tp


def schedule_of(work: Workload) -> Schedule:
    """The order of a step, without messages; remembered."""
    key = schedule_key(work.plan)
    found = _built((*key[:4], work.passes, *key[5:]), work.num_microbatches)
    if work.plan.schedule_file is not None:
        check_shape("stages", found.num_stages, work.plan.num_stages)
    return found


@lru_cache(maxsize=256)
def _built(key: Key, microbatches: int) -> Schedule:
    return scheduled(key, microbatches)

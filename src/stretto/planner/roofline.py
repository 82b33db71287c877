"""The parts of a step on the machine's roofline: how much they compute for each byte they move.

    operations/s ▲        ________ peak
                 │      /
                 │    /   x products           below the slanted roof a part waits for memory, under the flat one
                 │  / x norms                  for arithmetic; the distance to the roof is what it leaves unused
                 │/
                 └────────────────▶ operations per byte

Arithmetic grew faster than memory (Gholami et al. 2024, "AI and Memory Wall"), so that this tells what a faster device
would help.  Bytes are the least that a part can move, each operand once; seconds are the estimate's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stretto.planner import video
from stretto.planner.calibration import Calibration, published
from stretto.planner.compute import (
    ATTENTION_KERNELS,
    LOGITS,
    attention_seconds,
    head_seconds,
    kernels,
    moved_bytes,
    optimizer_seconds,
    rates,
    weight_shapes,
)
from stretto.planner.flops import keys_per_query
from stretto.planner.groups import apart
from stretto.planner.linear_layers import TOUCHED, kept, kernel_operations, kernel_seconds, of_kind
from stretto.planner.matmul import processors_of, weight_operations
from stretto.planner.workload import Workload
from stretto.spec.cluster import ClusterSpec

PASSES = 3
"""Products of a weight in a step: its output, and the gradients of its input and of itself."""
ELEMENT_BYTES = 2
"""Of activations and weights."""
FLASH_BACKWARD, BACKWARD = 2.5, 2.0
"""Forwards that attention's backward is, with the scores computed again and without."""
ATTENTION_TENSORS = 6
"""Times that queries (and outputs) or keys and values are read or written: forward q, o; backward q, o and both's
gradients; likewise k, v."""
HEAD = "head and loss"
"""Name of the part that only the last stage has."""
ADAM_OPERATIONS = 12
"""Of a parameter: two moments 5, their roots and corrections 4, decay and update 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a part of the step does on one rank, forward and backward."""

    name: str
    """Each forward and backward."""
    operations: float
    num_bytes: float
    """Read from and written to the device's memory."""
    seconds: float
    unit: str = "layer and micro-batch"
    """What that is for."""

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.num_bytes

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


def rooflines(work: Workload, calibration: Calibration | None = None) -> dict[ClusterSpec, tuple[Part, ...]]:
    """The parts of a step on each kind of machine, whose own figures count; the head is where the last stage is."""
    found = {}
    for machines, ranks in apart(work).items():
        updated = max(work.shares[rank].trained for rank in ranks)
        parts = roofline(replace(work, cluster=machines), calibration, updated=updated)
        last = any(len(work.layers) - 1 in work.shares[rank].stages for rank in ranks)
        found[machines] = parts if last else tuple(part for part in parts if part.name != HEAD)
    return found


def roofline(
    work: Workload, calibration: Calibration | None = None, *, updated: float | None = None
) -> tuple[Part, ...]:
    """The parts of one layer and micro-batch, of the head, and of the optimizer's step, on equal machines.

    ``updated``: parameters that a pipeline rank updates; None: the fullest rank's.
    """
    calibration, model = calibration or published(work.cluster.name), work.model
    updated = work.largest_trained if updated is None else updated
    optimizer = updated / work.states.optimizer
    states = 2 * work.stack.optimizer_bytes + work.stack.gradient_bytes + work.stack.parameter_bytes
    vocabulary = -(-model.num_outputs // work.plan.tp)
    operations, num_bytes, _ = _product(work, calibration, ((model.hidden_size, vocabulary),))
    logits = work.tokens * model.num_outputs / (work.plan.tp if work.stack.sharded_logits else 1)
    head = head_seconds(work, calibration)
    return (
        *_layer(work, calibration),
        Part(
            name=HEAD,
            operations=operations,
            num_bytes=num_bytes + sum(LOGITS) * logits,
            seconds=head.forward + head.backward,
            unit="micro-batch",
        ),
        Part(
            name="optimizer",
            operations=ADAM_OPERATIONS * optimizer,
            num_bytes=states * optimizer,
            seconds=optimizer_seconds(work, calibration, updated),
            unit="step",
        ),
    )


def _layer(work: Workload, calibration: Calibration) -> tuple[Part, ...]:
    """The parts of one layer; on average, where they differ."""
    if len(set(work.model.attention)) > 1:
        number = work.model.num_layers
        kinds = Counter(map(work.model.attention_of, range(number)))
        each = [(count / number, _layer(of_kind(work, kind), calibration)) for kind, count in kinds.items()]
        return tuple(
            Part(
                name=parts[0][1].name,
                operations=sum(share * part.operations for share, part in parts),
                num_bytes=sum(share * part.num_bytes for share, part in parts),
                seconds=sum(share * part.seconds for share, part in parts),
            )
            for parts in zip(*([(share, part) for part in layer] for share, layer in each), strict=True)
        )
    shapes, first = weight_shapes(work), 2 * _attentions(work)
    return (
        _products("attention's projections", work, calibration, shapes[:first]),
        _attention(work, calibration),
        _products("feed-forward", work, calibration, shapes[first:]),
        _elementwise(work, calibration),
    )


def _product(work: Workload, calibration: Calibration, shapes: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Operations, bytes and seconds of products with weights of these inputs and outputs."""
    tokens, processors = round(work.tokens), processors_of(work.cluster.name)
    operations = num_bytes = spent = 0.0
    for inputs, outputs in shapes:
        operations += PASSES * 2.0 * tokens * inputs * outputs
        num_bytes += PASSES * ELEMENT_BYTES * float(tokens * inputs + inputs * outputs + tokens * outputs)
        forward, backward = weight_operations(tokens, inputs, outputs, processors)
        spent += forward + (PASSES - 1) * backward
    seconds = spent / rates(work, calibration)[0] + PASSES * len(shapes) * calibration.kernel_latency
    return operations, num_bytes, seconds


def _products(name: str, work: Workload, calibration: Calibration, shapes: Sequence[tuple[int, int]]) -> Part:
    operations, num_bytes, seconds = _product(work, calibration, shapes)
    return Part(name=name, operations=operations, num_bytes=num_bytes, seconds=seconds)


def _attention(work: Workload, calibration: Calibration) -> Part:
    """Scores and their use; flash doesn't write them.  Of a layer that keeps a state, its chunked kernel."""
    model, flash = work.model, not work.stack.stores_scores
    if model.keeps_states:
        return Part(
            name="attention",
            operations=PASSES * kernel_operations(work),
            num_bytes=4 * work.tokens * kept(work).sums * sum(TOUCHED),
            seconds=sum(kernel_seconds(work, calibration)),
        )
    keys = keys_per_query(model, work.sequence_length, causal=flash)
    forward = 4 * work.tokens * model.num_heads * model.head_size * keys / work.plan.tp
    width = (model.num_heads + model.kv_heads) * model.head_size / work.plan.tp
    seconds = attention_seconds(work, calibration)
    launched = PASSES * _attentions(work) * ATTENTION_KERNELS[work.stack.attention] * calibration.kernel_latency
    return Part(
        name="attention",
        operations=forward * (1 + (FLASH_BACKWARD if flash else BACKWARD)),
        num_bytes=work.tokens * _attentions(work) * ATTENTION_TENSORS * width * ELEMENT_BYTES,
        seconds=seconds.forward + seconds.backward + launched,
    )


def _attentions(work: Workload) -> int:
    """Of a layer: two over clips."""
    return 1 if work.model.video is None else video.ATTENTIONS


def _elementwise(work: Workload, calibration: Calibration) -> Part:
    """Norms, activations, residuals, rotary: about one operation per element that is read or written."""
    num_bytes = sum(moved_bytes(work))
    attention = 0 if work.model.keeps_states else _attentions(work) * ATTENTION_KERNELS[work.stack.attention]
    others = kernels(work) - len(weight_shapes(work)) - attention
    return Part(
        name="norms and activations",
        operations=num_bytes / ELEMENT_BYTES,
        num_bytes=num_bytes,
        seconds=num_bytes / rates(work, calibration)[1] + PASSES * others * calibration.kernel_latency,
    )

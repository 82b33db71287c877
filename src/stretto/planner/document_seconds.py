"""Seconds of a portion of documents: what its tokens take as a row would, and attention document by document.

    a layer     = everything but attention, of a row of as many tokens on a rank by itself
                + attention of each document's pairs, at the rate that such a row's has
                + what isn't hidden of handing keys and values round its group

``Published`` puts it together from rates of devices (``compute``, ``communication``), ``Measured`` from the figures of
a calibrated machine (``measured_step``), where messages are copies, so that nothing is hidden.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stretto.planner.calibration import Calibration
from stretto.planner.communication import (
    ACTIVATION_BYTES,
    SUM_SHARE,
    boundary_seconds,
    context_seconds,
    group,
    logits_seconds,
    tensor_seconds,
    under,
)
from stretto.planner.compute import (
    ATTENTION_KERNELS,
    attention_seconds,
    head_seconds,
    layer_seconds,
)
from stretto.planner.document_costs import Costs, block_numbers
from stretto.planner.document_portions import Portion, alone
from stretto.planner.flops import keys_per_query
from stretto.planner.linear_layers import of_kind
from stretto.planner.machine import Machine
from stretto.planner.measured_step import (
    elements_of,
    ends,
    head,
    layer,
    layer_size,
    message_seconds,
    product_seconds,
)

if TYPE_CHECKING:
    from stretto.planner.workload import Workload
    from stretto.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Turn:
    """One way through a layer, or an end of the model."""

    work: float = 0.0
    """Seconds on the rank's own device or core."""
    waits: float = 0.0
    """Seconds for other ranks."""

    def __add__(self, other: Turn) -> Turn:
        """Both, one after the other."""
        return Turn(self.work + other.work, self.waits + other.waits)

    def times(self, number: float) -> Turn:
        """So many of them."""
        return Turn(number * self.work, number * self.waits)


Turns = tuple[Turn, Turn]
"""Forward and backward."""


def pairs(model: ModelSpec, length: int) -> float:
    """Queries and keys of a document that see each other."""
    return length * keys_per_query(model, length)


def volume(costs: Costs, ranks: int) -> float:
    """What a group sends over what a ring of keys and values would: other ways exchange heads, too."""
    return costs.sent(ranks) / (costs.passed(ranks) * (ranks - 1) / ranks)


@dataclass(frozen=True)
class Published:
    """By the rates of devices."""

    work: Workload
    calibration: Calibration
    costs: Costs
    """What the run places documents by."""

    def layer(self, portion: Portion) -> Turns:
        """One layer; on average, where they differ."""
        model, forward, backward = self.work.model, Turn(), Turn()
        for kind, number in Counter(map(model.attention_of, range(model.num_layers))).items():
            alike = replace(self, work=of_kind(self.work, kind))
            there, back = alike._with_keys(portion) if kind == "softmax" else alike._with_states(portion)
            share = number / model.num_layers
            forward, backward = forward + there.times(share), backward + back.times(share)
        return forward, backward

    def _with_states(self, portion: Portion) -> Turns:
        """A layer that keeps a state, which goes through every document that is cut."""
        one, rates, again = alone(self.work, portion.tokens, portion.ranks), self.calibration, Turn()
        whole, between = layer_seconds(one, rates), sum(tensor_seconds(one, rates))
        there, back = context_seconds(one, rates)
        documents = len(portion.documents)
        if self.work.plan.recompute == "full":
            again = Turn(whole.forward, 0.0)
        elif self.work.plan.recompute == "selective":
            again = Turn(attention_seconds(one, rates).forward, documents * there)
        forward = Turn(whole.forward, documents * there + between / 3)
        return forward, Turn(whole.backward, documents * back + between * 2 / 3) + again

    def _with_keys(self, portion: Portion) -> Turns:
        """A softmax layer."""
        model, rates = self.work.model, self.calibration
        one = alone(self.work, portion.tokens)
        whole, own = layer_seconds(one, rates), attention_seconds(one, rates)
        causal = not one.stack.stores_scores
        each = one.tokens * keys_per_query(model, portion.tokens, causal=causal)
        launched = self.launches * max(0, len(portion.documents) - 1)
        seen = sum(pairs(model, n) for n in portion.documents) / portion.ranks
        attention = [launched + seconds * seen / each for seconds in (own.forward, own.backward)]
        handed = [self._handed(one, portion, length) for length in portion.documents]
        waits = sum(there for there, _ in handed), sum(back for _, back in handed)
        between = sum(tensor_seconds(one, rates))
        forward = Turn(whole.forward - own.forward + attention[0], waits[0] + between / 3)
        backward = Turn(whole.backward - own.backward + attention[1], waits[1] + between * 2 / 3)
        again = self._again(forward, Turn(attention[0], waits[0]), cut=portion.ranks > 1)
        return forward, backward + again

    @property
    def launches(self) -> float:
        """Seconds of launching attention's kernels for one document more, in one layer and one way."""
        return ATTENTION_KERNELS[self.work.stack.attention] * self.calibration.kernel_latency

    def of_row(self, tokens: int, ranks: int) -> Costs:
        """The run's costs in seconds, at the rates of a row of which each of so many ranks has so many tokens."""
        whole = self._both(Portion(tokens=tokens, documents=(tokens * ranks,), first=0, ranks=ranks))
        linear = self._both(Portion(tokens=tokens, documents=(), first=0, ranks=ranks))
        pair = (whole - linear) * ranks / pairs(self.work.model, tokens * ranks)
        token, peak = linear / tokens, self.work.cluster.peak_flops_bfloat16
        rate, scale = 2 / peak, self.costs
        messages = None if scale.messages is None else {n: rate * cost for n, cost in scale.messages.items()}
        return replace(
            scale, pair=pair, token=token, exchange=rate * scale.exchange, near_exchange=rate * scale.near_exchange,
            messages=messages, state=rate * scale.state, near_state=rate * scale.near_state, host=None,
        )  # fmt: skip

    def _both(self, portion: Portion) -> float:
        """Seconds of all its layers and of the head, without what it waits for."""
        _, head = self.ends(portion)
        return sum(
            one.work * self.work.model.num_layers + end.work for one, end in zip(self.layer(portion), head, strict=True)
        )

    def _again(self, forward: Turn, attention: Turn, *, cut: bool) -> Turn:
        """What the backward computes once more; documents that are cut keep their attention's results."""
        if self.work.plan.recompute == "full":
            return Turn(forward.work - attention.work * cut, 0.0)
        return attention if self.work.plan.recompute == "selective" else Turn()

    def _handed(self, one: Workload, portion: Portion, length: int) -> tuple[float, float]:
        """What a document's ranks wait for each other's keys and values, forward and backward."""
        if portion.ranks == 1:
            return 0.0, 0.0
        model, plan, ranks = self.work.model, self.work.plan, portion.ranks
        ring = group(self.work, ranks, plan.tp, self.calibration)
        share = min(length / ranks, model.sliding_window or length)
        carried = 2 * model.kv_heads * model.head_size / plan.tp * share * ACTIVATION_BYTES
        carried *= volume(self.costs, ranks)
        own = attention_seconds(one, self.calibration)
        part = pairs(model, length) / ranks / one.tokens
        part /= keys_per_query(model, portion.tokens, causal=not one.stack.stores_scores)
        return (
            under(ring, carried, own.forward * part, self.calibration),
            under(ring, (1 + SUM_SHARE) * carried, own.backward * part, self.calibration),
        )

    def ends(self, portion: Portion) -> tuple[Turns, Turns]:
        """The embedding, and logits and loss."""
        one = alone(self.work, portion.tokens)
        last = head_seconds(one, self.calibration)
        gathered = logits_seconds(one, self.calibration)
        return (Turn(), Turn()), (Turn(last.forward, gathered), Turn(last.backward, 0.0))

    def operation(self, portion: Portion) -> tuple[float, float]:
        """What each operation takes besides, forward and backward."""
        return 0.0, 0.0

    def message(self, portion: Portion) -> float:
        """Handing it to the next stage."""
        return boundary_seconds(alone(self.work, portion.tokens), self.calibration)


@dataclass(frozen=True)
class Measured:
    """By the figures of a calibrated machine."""

    work: Workload
    machine: Machine
    costs: Costs
    """What the run places documents by."""

    def layer(self, portion: Portion) -> Turns:
        """One layer."""
        machine, plan = self.machine, self.work.plan
        one = alone(self.work, portion.tokens)
        products, elements, size = product_seconds(one, machine), elements_of(one), layer_size(one)
        attention = self._attention(portion)
        forward = products[0] + attention[0] + machine.rest_forward.at(elements)
        inputs = products[1] + attention[1] + machine.rest_backward.at(elements)
        handed = self._handed(portion)
        if plan.recompute == "full":
            inputs += forward - attention[0] * (portion.ranks > 1)
        elif plan.recompute == "selective":
            inputs += attention[0]
        copied = self._copied(portion)
        back = inputs * machine.factor("inputs", size) + products[2] * machine.factor("weights", size)
        waits = layer(one, machine).waits
        return (
            Turn(forward * machine.factor("forward", size) + copied, waits + handed[0]),
            Turn(back + copied, waits + handed[1] + (handed[0] if plan.recompute == "selective" else 0.0)),
        )

    def _attention(self, portion: Portion) -> tuple[float, float]:
        """The calibration's sizes are of whole squares under a mask; pairs that nobody sees aren't computed here."""
        model, plan = self.work.model, self.work.plan
        width = model.num_heads * model.head_size / plan.tp / portion.ranks
        sizes = [width * pairs(model, n) for n in portion.documents]
        curves = self.machine.attention_forward, self.machine.attention_backward
        return sum(curves[0].at(size) for size in sizes), sum(curves[1].at(size) for size in sizes)

    def _handed(self, portion: Portion) -> tuple[float, float]:
        """Keys and values that go round, message by message, and backward once more, with their gradients."""
        ranks, model = portion.ranks, self.work.model
        if ranks == 1:
            return 0.0, 0.0
        width = 2 * model.kv_heads * model.head_size / self.work.plan.tp * self.work.stack.parameter_bytes
        width *= volume(self.costs, ranks) / ranks
        once = (ranks - 1) * sum(self.machine.messages.at(width * length) for length in portion.documents)
        return once, 2 * once

    def _copied(self, portion: Portion) -> float:
        """Activations on their way to the host or back, on average of a layer."""
        if not portion.away:
            return 0.0
        numbers = block_numbers(self.work.model, self.work.plan.recompute) / self.work.plan.tp
        moved = self.machine.copy.at(portion.tokens * numbers * self.work.stack.parameter_bytes)
        return moved * portion.away / max(self.work.layers)

    def ends(self, portion: Portion) -> tuple[Turns, Turns]:
        """The embedding, and logits and loss."""
        one = alone(self.work, portion.tokens)
        last = head(one, self.machine)
        first, final = ends(one, self.machine) if self.work.plan.tp > 1 else (0.0, 0.0)
        return (Turn(0.0, first), Turn(0.0, first)), (Turn(last[0], final), Turn(last[1] + last[2], final))

    def operation(self, portion: Portion) -> tuple[float, float]:
        """What each operation takes besides, forward and backward."""
        machine, call = self.machine, self.machine.operation_seconds
        gaps, size = machine.factor("gaps", self.work.plan.num_ranks), layer_size(alone(self.work, portion.tokens))
        return call * (gaps + machine.factor("forward", size)), call * (gaps + machine.factor("inputs", size))

    def message(self, portion: Portion) -> float:
        """Handing it to the next stage."""
        return message_seconds(alone(self.work, portion.tokens), self.machine)

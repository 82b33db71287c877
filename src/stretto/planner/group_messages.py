"""What ranks of a group send each other for a document, by the size of the group: shared heads, keys on a ring, both.

Per layer and token of the document, on each of n ranks, of whom u share heads at each of s = n/u seats:

    Ulysses    4 K e (u-1)/n (H/u + g)       forward and backward alike
    ring       2 K g (2e + x) (s-1)/s        keys and values twice, and their gradients

with H query and G key/value heads of size K, of which a rank reads g (G/u or more), e bytes a number and x a sum
(``sequence_volume`` counts the same message by message).  FlexSP's groups are Ulysses alone: of s = 1, so that no more
ranks share a document than divide its heads.

A node's ranks follow each other, and groups are aligned.  Messages between two of a node are faster; a ring is as slow
as its slowest link, unless it is double and crosses between nodes only once a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.planner.sequence_volume import Heads, at_seat
from stretto.spec.sequence import Arrangement, heads_of

if TYPE_CHECKING:
    from stretto.spec.model import ModelSpec
    from stretto.spec.run import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What a byte costs between two ranks."""

    near: int
    """Data ranks of a node; 0: all links are alike."""
    near_byte: float
    """Inside a node."""
    byte: float
    """Between nodes, and where all are alike."""

    def of(self, inside: int, across: int) -> float:
        """What so many messages of a byte cost."""
        return inside * self.near_byte + across * self.byte

    def shares(self, ranks: tuple[int, ...]) -> tuple[int, int]:
        """How many of the others the first reaches inside its node, and how many elsewhere."""
        same = sum(rank // self.near == ranks[0] // self.near for rank in ranks[1:]) if self.near else 0
        return same, len(ranks) - 1 - same


def messages_of(run: RunSpec, links: Links, *, element_bytes: int) -> dict[int, float] | None:
    """Of all layers, for every size of group whose ranks can share a document; None where a plain ring says it all.

    Over tp each rank sends its part, and what is given is all of it.
    """
    plan, model = run.plan, run.model
    if plan.context not in ("ulysses", "mesh") and plan.inner_ring == 1:
        return None
    heads = Heads(
        rows=1,
        heads=model.num_heads // plan.tp,
        kv_heads=max(1, model.kv_heads // plan.tp),
        head_size=model.head_size,
        element_bytes=element_bytes,
    )
    pool = plan.cp * plan.dp
    groups = [Arrangement.of_group(plan, n) for n in range(2, pool + 1) if pool % n == 0]
    whole = plan.tp * num_softmax(model)
    return {who.ranks: whole * token_cost(who, heads, links) for who in groups if heads.heads % who.ulysses == 0}


def num_softmax(model: ModelSpec) -> int:
    """Layers whose tokens look at each other; the others keep a state."""
    return sum(model.attention_of(layer) == "softmax" for layer in range(model.num_layers))


def state_bytes(run: RunSpec, *, sum_bytes: int) -> int:
    """Bytes of states for every other rank of a group, forward and backward, of all layers (``state_volume``).

    So much a rank sends each of them (LASP-2), or is handed on so often, one hop after the other (LASP).
    """
    plan, model, found = run.plan, run.model, 0
    state = model.head_size**2
    for kind in map(model.attention_of, range(model.num_layers)):
        if kind != "softmax":
            through = 0 if plan.linear_context == "ring" else 1 if kind == "linear" else state
            found += model.kv_heads * (2 * state + through) * sum_bytes
    return found * (2 if plan.context_layout == "zigzag" else 1)


def token_cost(who: Arrangement, heads: Heads, links: Links) -> float:
    """What a token of a document costs a rank of a group, in one layer, forward and backward."""
    found, size = 0.0, heads.head_size
    if who.ulysses > 1:
        inside, across = links.shares(who.sharers(0))
        cuts = [heads_of(heads.heads, heads.kv_heads, who.ulysses, index)[1] for index in range(who.ulysses)]
        read = heads.heads // who.ulysses + max(last - first for first, last in cuts)
        found += 4 * size * heads.element_bytes * read / who.ranks * links.of(inside, across)
    if who.seats > 1:
        keys = max(at_seat(heads, who.ulysses, index).kv_heads for index in range(who.ulysses))
        passed = 2 * size * keys * (2 * heads.element_bytes + heads.sum_bytes)
        found += passed / who.seats * links.of(*_hops(who, links))
    return found


def _hops(who: Arrangement, links: Links) -> tuple[int, int]:
    """Messages of a ring that go at a node's pace, and those that go at the pace between nodes."""
    ring = who.ring(0)
    if not links.shares(ring)[1]:
        return who.seats - 1, 0
    if links.shares(ring[: who.inner_ring])[1]:
        return 0, who.seats - 1
    rounds = who.seats // who.inner_ring
    return who.seats - rounds, rounds - 1

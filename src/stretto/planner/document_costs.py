"""What documents cost that are cut over groups of ranks: work, messages, and the way of activations to the host.

A document's pairs grow with the square of its length, its activations with the length: so the longer it is, the more of
its activations can be in the host's memory when nobody needs them, copied under its own attention (ByteScale).  It
then fits on fewer ranks.  Of a model's blocks the first ``away`` go, and the budget of a rank is what remains:

    forward    │F0│F1│F2│F3│F4│F5│            4 of 6 away: no more than 2 blocks' activations lie here at once, and
    out           │c0│c1│c2│c3│ ◄── F5 waits  all copies have the time from F0's end to F5's beginning
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stretto.planner.flops import BACKWARD, parameters, state_flops
from stretto.planner.group_messages import Links, messages_of, num_softmax, state_bytes
from stretto.spec.stages import stages_of

if TYPE_CHECKING:
    from stretto.spec.model import ModelSpec
    from stretto.spec.run import RunSpec

FLOPS_PER_BYTE = 5000.0
"""Operations that a device does while a byte is sent, where the cluster doesn't say: accelerators with a network card
each (A100: 6,240 at half their peak)."""
FLOPS_PER_HOST_BYTE = 7800.0
"""The same for a byte on its way to the host (A100: half its peak over 20 GB/s, what the planner takes for PCIe)."""
HOST_BYTES_PER_SECOND = 2e10
"""Of a device to its host's memory, one direction."""
TURNS = 2
"""Blocks whose activations are here at least: the one at work, and one on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host's memory, where activations of long documents can be between forward and backward."""

    blocks: int
    """Blocks of the fullest stage; the others hold less of a micro-batch, and as many of theirs go."""
    copy: float
    """One way of one token's activation of one block, in the unit of the costs: those of ``blocks`` blocks are taken
    for a whole document's, so over pp it is as many times dearer as the model has more."""
    ends: float = 0.0
    """What a token keeps besides (logits), in activations of a block; it stays."""

    def kept(self, away: int) -> float:
        """Share of a micro-batch's memory that is taken when ``away`` blocks' activations are on the host.

        >>> Host(blocks=8, copy=1.0).kept(6), Host(blocks=8, copy=1.0, ends=2.0).kept(4)
        (0.25, 0.6)
        """
        here = self.blocks - away if away else self.blocks
        return (self.ends + max(min(TURNS, self.blocks), here)) / (self.ends + self.blocks)

    def hidden(self, forward: float, tokens: int) -> int:
        """Blocks at most whose copies a micro-batch of ``tokens`` hides under a forward that takes so long."""
        most = max(0, self.blocks - TURNS)
        if not self.copy * tokens:
            return most
        return min(most, int(forward * most / self.blocks / (self.copy * tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a step's work costs, forward and backward, in any one unit (seconds, FLOP)."""

    pair: float
    """A query that sees a key."""
    token: float
    """What is linear in the tokens."""
    exchange: float = 0.0
    """Keys and values of a token passed to a rank, and their gradients passed back; hidden under attention."""
    near: int = 0
    """Data ranks of a node, whose links are faster; 0: all are alike."""
    near_exchange: float = 0.0
    """What an exchange costs inside a node."""
    micro_batch: float = 0.0
    """What each micro-batch costs beside its tokens."""
    window: int | None = None
    """Keys that a query sees at most; None: all before it."""
    host: Host | None = None
    """Where activations of long documents can be; None: they stay."""
    messages: Mapping[int, float] | None = None
    """What a token of a document costs each rank in messages, by the size of its group; sizes that are missing can't
    share the heads.  None: keys and values go round, ``exchange`` from rank to rank."""
    state: float = 0.0
    """What a document costs each rank for every other one of its group, whatever its length: states between nodes."""
    near_state: float = 0.0
    """The same inside a node."""

    def serves(self, ranks: int) -> bool:
        """Whether so many ranks can share a document."""
        return ranks == 1 or self.messages is None or ranks in self.messages

    def pairs(self, length: int) -> int:
        """Pairs of a document under a causal mask."""
        seen = min(self.window or length, length)
        return seen * (seen + 1) // 2 + (length - seen) * seen

    def passed(self, ranks: int) -> float:
        """An exchange between ``ranks`` ranks that follow each other, the first a multiple of them."""
        return self.near_exchange if self._near(ranks) else self.exchange

    def _near(self, ranks: int) -> bool:
        """Whether a group of so many is of one node."""
        return bool(self.near) and self.near % ranks == 0

    def time(self, length: int, ranks: int) -> float:
        """How long each of ``ranks`` ranks works on a document that is cut over them."""
        attention = self.pair * self.pairs(length) / ranks
        states = (ranks - 1) * (self.near_state if self._near(ranks) else self.state)
        return self.token * -(-length // ranks) + max(attention, self.sent(ranks) * length) + states

    def sent(self, ranks: int) -> float:
        """What a token of a document costs each of so many ranks in messages."""
        if ranks > 1 and self.messages is not None:
            return self.messages[ranks]
        return self.passed(ranks) * (ranks - 1) / ranks

    def away(self, length: int, ranks: int, memory_tokens: int) -> int | None:
        """Blocks whose activations must go to the host for a rank's share to fit; None where it can't.

        None too where the document's own forward doesn't hide the copies.
        """
        share = -(-length // ranks)
        if share <= memory_tokens:
            return 0
        if self.host is None:
            return None
        most = self.host.hidden(self.time(length, ranks) / (1 + BACKWARD), share)
        return next((n for n in range(1, most + 1) if share * self.host.kept(n) <= memory_tokens), None)

    def room(self, away: int, memory_tokens: int) -> int:
        """Tokens of a micro-batch on a rank, at most, when ``away`` blocks' activations are on the host."""
        return memory_tokens if not away or self.host is None else int(memory_tokens / self.host.kept(away))


def costs_of(run: RunSpec) -> Costs:
    """What the run's documents cost, in FLOP of forward and backward; over tp each rank has its part of all of it."""
    model, cluster = run.model, run.cluster
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[run.training.dtype]
    passed = 2 * size + max(size, 4)  # keys and values twice, and their gradients
    narrow = run.training.dtype == "bfloat16"
    peak = cluster.peak_flops_bfloat16 if narrow else cluster.peak_flops_float32
    inside, several = cluster.link_bytes_per_second, cluster.num_nodes > 1
    rate = cluster.network_bytes_per_second if several else inside
    per_byte = peak / 2 / rate if peak and rate else FLOPS_PER_BYTE
    way = peak / 2 / HOST_BYTES_PER_SECOND or FLOPS_PER_HOST_BYTE
    near = peak / 2 / inside if peak and inside else per_byte
    of_node = cluster.devices_per_node // run.plan.tp if several else 0
    layers = num_softmax(model)
    keys = 2 * model.kv_heads * model.head_size * layers
    states = state_bytes(run, sum_bytes=max(size, 4))
    both = 1 + BACKWARD
    return Costs(
        pair=both * 4 * layers * model.num_heads * model.head_size,
        token=both * (2 * parameters(model).multiplying + state_flops(model)),
        exchange=keys * passed * per_byte,
        near=of_node,
        near_exchange=keys * passed * near,
        window=model.sliding_window,
        host=_host(run, element_bytes=size, per_byte=way) if run.plan.offload else None,
        messages=messages_of(run, Links(near=of_node, near_byte=near, byte=per_byte), element_bytes=size),
        state=states * per_byte,
        near_state=states * near,
    )


def block_numbers(model: ModelSpec, recompute: str) -> int:
    """What a block keeps of a token, in numbers (as ``tracked`` counts them): the block's input and attention's output
    where the rest is computed again."""
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    if recompute == "full":
        return model.hidden_size + queries
    ups = 2 if model.family == "gpt2" else 4
    return 4 * model.hidden_size + 2 * queries + 2 * keys + ups * model.intermediate_size


def _host(run: RunSpec, *, element_bytes: int, per_byte: float) -> Host:
    """The host of a run's documents, whose blocks are those of the fullest stage."""
    whole = host_of(run.model, run.plan.recompute, element_bytes=element_bytes, per_byte=per_byte)
    blocks = max(stages_of(run))
    return replace(whole, blocks=blocks, copy=whole.copy * whole.blocks / blocks)


def host_of(model: ModelSpec, recompute: str, *, element_bytes: int, per_byte: float) -> Host:
    """The host of a model's documents; ``per_byte``: what the way of a byte costs, in the unit of the costs."""
    block, size = block_numbers(model, recompute), element_bytes
    ends = 2 * model.hidden_size + model.vocab_size * max(size, 4) / size
    return Host(blocks=model.num_layers, copy=block * size * per_byte, ends=ends / block)

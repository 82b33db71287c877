"""Classic faults of parallel training, each as a context that a rank enters and that breaks it.

Every one replaces a function of the system by a version with the mistake; leaving the context repairs it, since the
worker processes are reused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from stretto.assemble import rank_model, shard
from stretto.assemble.sequence import SequenceCut
from stretto.models import decoder, dropout
from stretto.models.rotary import RotaryTables
from stretto.parallel import flat, master, tensor, vocab
from stretto.parallel.clip import squared_norm_held
from stretto.parallel.collectives import DONE, all_reduce, gather_dim, reduce_scatter_dim, size_of
from stretto.parallel.flat import FlatUnit
from stretto.parallel.master import Master
from stretto.parallel.pipeline.channel import PeerChannel
from stretto.parallel.pipeline.segment import Segment
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.sequence.pieces import Meeting
from stretto.parallel.sequence.ring import Ring
from stretto.parallel.tensor import RowParallelLinear
from stretto.parallel.unit import SETTLE_PHASES, LocalUnit
from stretto.parallel.vocab import VocabParallelEmbedding
from stretto.trainer import step
from stretto.trainer.step import TrainStep


@contextmanager
def tied_gradient_counted_twice() -> Iterator[None]:
    """The two ends of the pipeline sum the tied gradient, and then do it again."""
    reduce = FlatUnit.reduce_gradients

    def wrong(self: FlatUnit) -> None:
        reduce(self)
        if self._holders is not None and self._remaining == 0:
            self._reducing.wait()
            self._reduced = False
            reduce(self)

    with patch.object(FlatUnit, "reduce_gradients", wrong):
        yield


@contextmanager
def tied_gradients_not_summed() -> Iterator[None]:
    """Each end of the pipeline keeps its own gradient of the tied weight."""
    with patch.object(FlatUnit, "_replicas", property(lambda self: self._mesh.group("copies"))):
        yield


@contextmanager
def tied_weight_counted_twice_in_norm() -> Iterator[None]:
    """The gradient norm counts both copies of the tied weight."""

    def wrong(sharding: Any, mesh: Any, holders: Any) -> bool:
        return master.counts_here(sharding, mesh)

    with patch.object(flat, "counts_here", wrong):
        yield


@contextmanager
def norm_gradient_not_summed_over_tp() -> Iterator[None]:
    """A norm between two regions saw only its slice of the sequence, and nobody sums what the ranks found."""
    settle = FlatUnit.settle

    def wrong(self: FlatUnit, phase: int) -> Any:
        return DONE if phase == SETTLE_PHASES - 1 else settle(self, phase)

    with patch.object(FlatUnit, "settle", wrong):
        yield


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Each data-parallel rank divides by its own number of tokens, and the means are averaged."""

    def wrong(batches: Any, mesh: Any) -> Any:
        tokens = torch.stack([(b.labels != -100).sum() for b in batches]).sum()
        return tokens * mesh.size("dp_replicate", "dp_shard"), DONE

    with patch.object(step, "count_tokens", wrong):
        yield


@contextmanager
def dropped_layer() -> Iterator[None]:
    """A stage loses the third layer of the model."""
    init = Stage.__init__

    def wrong(self: Stage, index: int, segments: Any) -> None:
        init(self, index, [s for s in segments if s.name != "blocks.2"])

    with patch.object(Stage, "__init__", wrong):
        yield


@contextmanager
def swapped_stages() -> Iterator[None]:
    """The second and third stage hold each other's layers."""
    parts_of_stages = rank_model.parts_of_stages

    def wrong(layers: Any, **named: Any) -> Any:
        first, second, third, *rest = parts_of_stages(layers, **named)
        return [first, replace(third, index=1), replace(second, index=2), *rest]

    with patch.object(rank_model, "parts_of_stages", wrong):
        yield


@contextmanager
def rotary_offset_of_last_stage() -> Iterator[None]:
    """The last rank takes its sequence for two shards, each of which starts at position 0."""
    at = RotaryTables.at

    def wrong(self: RotaryTables, positions_BT: torch.Tensor, **rest: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            positions_BT = positions_BT % (positions_BT.size(1) // 2)
        return at(self, positions_BT, **rest)

    with patch.object(RotaryTables, "at", wrong):
        yield


@contextmanager
def no_reduction_over_dp() -> Iterator[None]:
    """Replicas keep their own gradients."""
    with patch.object(FlatUnit, "reduce_gradients", lambda self: None):
        yield


@contextmanager
def clip_by_local_norm() -> Iterator[None]:
    """Each rank clips by the norm of what it holds itself."""
    scale_gradients = step.scale_gradients

    def wrong(masters: Any, factor: float) -> None:
        local = float(squared_norm_held(masters, device=torch.device("cpu"))) ** 0.5
        scale_gradients(masters, min(1.0, 0.1 / local))

    with patch.object(step, "scale_gradients", wrong):
        yield


@contextmanager
def documents_not_masked() -> Iterator[None]:
    """Tokens see the documents that were packed before their own."""
    attention_mask = decoder.attention_mask
    with patch.object(decoder, "attention_mask", lambda b, w: attention_mask(replace(b, documents=None), w)):
        yield


@contextmanager
def kv_heads_on_wrong_tp_rank() -> Iterator[None]:
    """Key and value heads are dealt to the tp ranks in reverse."""
    cut = shard.cut

    def wrong(name: str, shape: Any, *, parts: int, index: int, **rest: Any) -> Any:
        if ".attention.k." in name or ".attention.v." in name:
            index = parts - 1 - index
        return cut(name, shape, parts=parts, index=index, **rest)

    with patch.object(shard, "cut", wrong):
        yield


@contextmanager
def dropout_keyed_by_rank() -> Iterator[None]:
    """Every rank draws its own dropout."""
    sample_keys = dropout.sample_keys
    with patch.object(dropout, "sample_keys", lambda context, site: sample_keys(context, site) + dist.get_rank()):
        yield


@contextmanager
def recompute_draws_again() -> Iterator[None]:
    """A block that is recomputed in the backward pass drops other elements than before."""
    backward = Segment.backward

    def wrong(self: Segment, kept: Any, dy: Any, context: Any, batch: Any) -> Any:
        if self.recompute:
            context = replace(context, place=replace(context.place, step=context.place.step + 1))
        return backward(self, kept, dy, context, batch)

    with patch.object(Segment, "backward", wrong):
        yield


@contextmanager
def vocabulary_shard_off_by_one() -> Iterator[None]:
    """The embedding's second shard is taken to start one row later."""
    init = VocabParallelEmbedding.__init__

    def wrong(self: Any, weight: Any, start: int, group: Any) -> None:
        init(self, weight, start + (start > 0), group)

    with patch.object(VocabParallelEmbedding, "__init__", wrong):
        yield


@contextmanager
def softmax_over_own_shard() -> Iterator[None]:
    """The loss subtracts each rank's own maximum before it sums the exponentials of all."""

    def wrong(x: Any, group: Any, *, maximum: bool = False) -> Any:
        return DONE if maximum else all_reduce(x, group)

    with patch.object(vocab, "all_reduce", wrong):
        yield


@contextmanager
def row_bias_added_on_each_rank() -> Iterator[None]:
    """The bias after a row-split layer is added before the sum over tp, so it counts tp times."""

    def wrong(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        return tensor.scatter_sequence(y, self._group)

    with patch.object(RowParallelLinear, "forward", wrong):
        yield


@contextmanager
def region_gradient_averaged() -> Iterator[None]:
    """The gradient of a region's input is averaged over tp instead of summed."""

    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ranks = size_of(ctx.group)
        return reduce_scatter_dim(grads[0], 1, ctx.group) / ranks, None

    with patch.object(tensor._Gather, "backward", staticmethod(backward)):
        yield


@contextmanager
def sequence_slices_in_wrong_order() -> Iterator[None]:
    """What is gathered over the sequence is put together in reverse rank order."""

    def wrong(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        parts = gather_dim(x, dim, group).chunk(size_of(group), dim)
        return torch.cat(list(reversed(parts)), dim)

    with patch.object(tensor, "gather_dim", wrong):
        yield


@contextmanager
def reduce_scatter_to_wrong_rank() -> Iterator[None]:
    """Gradient shards arrive one rank further."""
    reduce_scatter = flat.reduce_scatter

    def wrong(whole: torch.Tensor, part: torch.Tensor, group: Any) -> Any:
        return reduce_scatter(whole.view(size_of(group), -1).roll(1, 0).flatten(), part, group)

    with patch.object(flat, "reduce_scatter", wrong):
        yield


@contextmanager
def last_micro_batch_wins() -> Iterator[None]:
    """Gradients of a micro-batch overwrite those of the one before instead of adding to them."""
    add_gradients = LocalUnit.add_gradients

    def wrong(self: LocalUnit, gradients: Any) -> None:
        self.begin_step(1)
        add_gradients(self, gradients)

    with patch.object(LocalUnit, "add_gradients", wrong):
        yield


@contextmanager
def micro_batches_mixed_up() -> Iterator[None]:
    """The last stage reads the micro-batches of its step in reverse, against what it is sent."""
    gradients = TrainStep.gradients

    def wrong(self: TrainStep, number: int, batches: Any, **rest: Any) -> Any:
        late = dist.get_rank() == dist.get_world_size() - 1
        return gradients(self, number, batches[::-1] if late else batches, **rest)

    with patch.object(TrainStep, "gradients", wrong):
        yield


@contextmanager
def boundary_gradient_halved() -> Iterator[None]:
    """A message of gradients between two stages arrives scaled."""
    send = PeerChannel.send

    def wrong(self: PeerChannel, message: Any, value: Any) -> None:
        send(self, message, value * 0.5 if message.direction == "B" else value)

    with patch.object(PeerChannel, "send", wrong):
        yield


@contextmanager
def boundary_gradient_not_finite() -> Iterator[None]:
    """A message of gradients between two stages overflows."""
    send = PeerChannel.send

    def wrong(self: PeerChannel, message: Any, value: Any) -> None:
        send(self, message, value * float("nan") if message.direction == "B" else value)

    with patch.object(PeerChannel, "send", wrong):
        yield


@contextmanager
def parameters_not_published() -> Iterator[None]:
    """After the update the other ranks' shards of the parameters stay as they were."""
    with patch.object(FlatUnit, "publish", lambda self: None):
        yield


@contextmanager
def decay_on_norms() -> Iterator[None]:
    """Weight decay reaches norms and biases."""
    with patch.object(Master, "decays", True):
        yield


@contextmanager
def key_gradients_lost_on_the_ring() -> Iterator[None]:
    """Gradients of keys and values that other seats found never come home."""
    whole = Ring.differentiate

    def wrong(self: Ring, task: Any, rows: Any, kv: Any, kept: Any) -> Any:
        dq, _ = whole(self, task, rows, kv, kept)
        mine = task.seats[self.seat]
        return dq, task.shares(rows, kv, Meeting(queries=mine, keys=mine), torch.zeros_like(dq))

    with patch.object(Ring, "differentiate", wrong):
        yield


@contextmanager
def positions_as_if_contiguous() -> Iterator[None]:
    """A share of a zigzag gets the positions of the row's first tokens."""
    cut = SequenceCut.__call__

    def wrong(self: SequenceCut, batch: Any) -> Any:
        found = cut(self, batch)
        return replace(found, positions=batch.positions[:, : found.tokens.shape[1]])

    with patch.object(SequenceCut, "__call__", wrong):
        yield


@contextmanager
def frames_as_if_the_first() -> Iterator[None]:
    """A part of a clip's frames gets the places of the first ones."""
    cut = SequenceCut.__call__

    def wrong(self: SequenceCut, batch: Any) -> Any:
        found = cut(self, batch)
        assert found.clips is not None
        return replace(found, clips=replace(found.clips, frames=(0, found.clips.noisy.shape[1])))

    with patch.object(SequenceCut, "__call__", wrong):
        yield

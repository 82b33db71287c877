"""Masters as pieces: every element of every parameter exactly once over the mesh, under its own name."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.parallel.master import Master, counts_here
from stretto.parallel.mesh import AXES, STATE_AXES, Holders, Mesh
from stretto.spec.contract import Piece
from stretto.spec.sharding import Sharding, cut

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def mesh_at(**place: tuple[int, int]) -> Mesh:
    """A mesh without groups: ``axis=(index, size)``."""
    return Mesh(
        sizes={a: place.get(a, (0, 1))[1] for a in (*AXES, *STATE_AXES)},
        coordinates={a: place.get(a, (0, 1))[0] for a in (*AXES, *STATE_AXES)},
        rank=0,
        groups={},
    )


def masters_of(whole: torch.Tensor, *, dim: int | None, tp: int, shards: int) -> list[Master]:
    """What all tp x dp_shard ranks hold of ``whole``, cut as a flat unit cuts a parameter of its own."""
    found = []
    for t in range(tp):
        sharding = cut("blocks.0.w", tuple(whole.shape), dim=dim, parts=tp, index=t)
        window = tuple(slice(o, o + n) for o, n in zip(sharding.slice.offset, sharding.slice.length, strict=True))
        flat = whole[window].reshape(-1)
        width = -(-flat.numel() // shards)
        for d in range(shards):
            low, high = min(d * width, flat.numel()), min((d + 1) * width, flat.numel())
            counted = counts_here(sharding, mesh_at(tp=(t, tp)))
            found.append(
                Master(tensor=flat[low:high], sharding=sharding, start=low, stop=high, counted=counted, owned=counted)
            )
    return found


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, tp=st.integers(1, 4), shards=st.integers(1, 5), data=st.data())
def test_pieces_cover_every_element_once(shape: tuple[int, ...], tp: int, shards: int, data: st.DataObject) -> None:
    dim = data.draw(st.none() | st.integers(0, len(shape) - 1))
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    pieces = [p for m in masters_of(whole, dim=dim, tp=tp, shards=shards) for p in m.pieces("model", m.tensor)]
    again, seen = torch.full(shape, -1.0, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64)
    for piece in pieces:
        assert (piece.name, piece.shape) == ("model.blocks.0.w", shape)
        if piece.owned:
            again[window_of(piece)] = piece.tensor
            seen[window_of(piece)] += 1
        assert torch.equal(whole[window_of(piece)], piece.tensor)
    assert bool((seen == 1).all()) and torch.equal(again, whole)


def window_of(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))


def test_a_piece_shares_memory_with_its_master() -> None:
    master = masters_of(torch.zeros(4, 3), dim=None, tp=1, shards=1)[0]
    for piece in master.pieces("model", master.tensor):
        piece.tensor.fill_(7.0)
    assert bool((master.tensor == 7.0).all())


def test_a_tied_copy_goes_by_the_name_of_its_original_and_counts_on_the_first_holder() -> None:
    sharding = Sharding.whole("outputs.head.weight", (2, 3), tied_to="inputs.tokens.weight")
    holders = Holders(ranks=(0, 2), group=None)
    assert counts_here(sharding, mesh_at(pp=(0, 3)), holders)
    counted = counts_here(sharding, mesh_at(pp=(2, 3)), holders)
    master = Master(tensor=torch.zeros(2, 3), sharding=sharding, start=0, stop=6, counted=counted, owned=counted)
    (piece,) = master.pieces("model", master.tensor)
    assert piece.name == "model.inputs.tokens.weight" and not piece.owned and not counted


def test_whole_parameters_count_on_the_first_tp_rank_and_cut_ones_on_all() -> None:
    whole, split = Sharding.whole("norm", (4,)), cut("w", (4, 4), dim=0, parts=2, index=1)
    assert [counts_here(whole, mesh_at(tp=(i, 2))) for i in range(2)] == [True, False]
    assert counts_here(split, mesh_at(tp=(1, 2)))


def test_only_weights_of_two_dims_decay() -> None:
    def master(*shape: int) -> Master:
        # Under dp_shard the tensor is flat, so the parameter's shape must decide.
        return Master(
            tensor=torch.zeros(1), sharding=Sharding.whole("w", shape), start=0, stop=1, counted=True, owned=True
        )

    assert master(3, 4).decays and not master(3).decays

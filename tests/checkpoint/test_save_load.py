"""Whatever wrote a checkpoint, whoever reads it finds the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.checkpoint.cuts import SHAPES, differing, pieces_of, values

from ranks import Ranks
from stretto.checkpoint import latest, list_tensors, load, read_state, save, verify
from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError

STATE = {"seed": 3, "tokens_seen": 12345, "tokenizer": "ab12", "plan": {"pp": 2, "stages": None}, "rate": 0.1}


def write(rank: int, world: int, directory: str, step: int, seed: int, cut_seed: int) -> str:
    pieces = pieces_of(rank, world, seed=seed, cut_seed=cut_seed, filled=True)
    return str(save(Path(directory), step=step, pieces=pieces, state=STATE))


def read(rank: int, world: int, path: str, seed: int, cut_seed: int) -> tuple[list[str], dict[str, Any]]:
    pieces = pieces_of(rank, world, seed=seed, cut_seed=cut_seed, filled=False)
    state = load(Path(path), pieces)
    return differing(pieces, seed), state


def message_of_failed_read(rank: int, world: int, path: str, name_on_rank_1: str) -> str:
    shape = SHAPES["model.inputs.weight"]
    name = name_on_rank_1 if rank == 1 else "model.inputs.weight"
    try:
        load(Path(path), [whole(name, torch.zeros(shape))])
    except CheckpointError as error:
        return str(error)
    return ""


def message_of_failed_write(rank: int, world: int, directory: str, owners: tuple[int, ...]) -> str:
    piece = Piece(name="w", shape=(4,), offset=(0,), tensor=torch.ones(4), owned=rank in owners)
    try:
        save(Path(directory), step=1, pieces=[piece], state={})
    except CheckpointError as error:
        return str(error)
    return ""


def whole(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name=name, shape=tuple(tensor.shape), offset=(0,) * tensor.ndim, tensor=tensor)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    writers=st.integers(1, 4),
    readers=st.integers(1, 4),
    seed=st.integers(0, 99),
    cuts=st.tuples(*[st.integers(0, 999)] * 2),
)
def test_any_cut_by_any_ranks_is_read_bitwise_by_any_other(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, writers: int, readers: int, seed: int, cuts: tuple[int, int]
) -> None:
    directory = str(tmp_path_factory.mktemp("any"))
    paths = ranks.run(write, writers, directory, 17, seed, cuts[0])
    assert set(paths) == {f"{directory}/step-000017"}
    for wrong, state in ranks.run(read, readers, paths[0], seed, cuts[1]):
        assert wrong == []
        assert state == {**STATE, "step": 17}


def test_one_process_without_process_group_reads_and_writes(tmp_path: Path) -> None:
    path = Path(write(0, 1, str(tmp_path), 5, 1, 2))
    assert read(0, 1, str(path), 1, 3) == ([], {**STATE, "step": 5})
    verify(path)
    assert read_state(path) == {**STATE, "step": 5}
    assert latest(tmp_path) == path
    listed = {name: (tensor.shape, tensor.dtype) for name, tensor in list_tensors(path).items()}
    assert listed == {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in values(1).items()}


def test_dtype_is_converted_and_views_are_filled_in_place(tmp_path: Path) -> None:
    stored = torch.randn(6, 4, dtype=torch.float64)
    path = save(tmp_path, step=1, pieces=[whole("w", stored)], state={})
    flat = torch.zeros(48, dtype=torch.bfloat16)
    load(path, [whole("w", flat[8:32].view(6, 4))])
    assert torch.equal(flat[8:32].view(6, 4), stored.to(torch.bfloat16))
    assert flat[:8].count_nonzero() == 0 and flat[32:].count_nonzero() == 0


def test_a_parameter_and_its_tied_copy_on_one_rank_are_both_filled(tmp_path: Path) -> None:
    stored = torch.randn(6, 4)
    path = save(tmp_path, step=1, pieces=[whole("w", stored)], state={})
    first, second = torch.zeros(6, 4), torch.zeros(6, 4, requires_grad=True)
    load(path, [whole("w", first), whole("w", second)])
    assert torch.equal(first, stored) and torch.equal(second.detach(), stored)


def test_missing_and_misshaped_names_are_told(tmp_path: Path) -> None:
    path = save(tmp_path, step=1, pieces=[whole("w", torch.ones(6, 4))], state={})
    with pytest.raises(CheckpointError, match=r"lacks model\.v: it was written for another model"):
        load(path, [whole("w", torch.ones(6, 4)), whole("model.v", torch.ones(2))])
    with pytest.raises(CheckpointError, match=r"w \(stored \[6, 4\], wanted \[4, 6\]\)"):
        load(path, [whole("w", torch.ones(4, 6))])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "step-000009", [])


def test_an_error_on_one_rank_is_raised_on_all(ranks: Ranks, tmp_path: Path) -> None:
    path = write(0, 1, str(tmp_path), 5, 1, 2)
    first, second = ranks.run(message_of_failed_read, 2, path, "model.nowhere")
    assert first == second and "lacks model.nowhere" in first


@pytest.mark.parametrize("owners", [(), (0, 1)])
def test_a_tensor_that_nobody_or_two_own_is_not_saved(ranks: Ranks, tmp_path: Path, owners: tuple[int, ...]) -> None:
    messages = ranks.run(message_of_failed_write, 2, str(tmp_path), owners)
    assert messages[0] == messages[1]
    assert "cover each of these tensors exactly once" in messages[0] and ": w" in messages[0]
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be JSON values"):
        save(tmp_path, step=1, pieces=[whole("w", torch.ones(2))], state={"bad": float("nan")})
    path = save(tmp_path, step=1, pieces=[whole("w", torch.ones(2))], state={"by_rank": {10: "a", 2: (1, 2)}})
    assert read_state(path) == {"by_rank": {"10": "a", "2": [1, 2]}, "step": 1}

"""What of cp can't work is said before a process starts, with the reason and the choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stretto.spec.check import check
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec

MODEL = ModelSpec(hidden_size=48, intermediate_size=96, num_layers=2, num_heads=12, num_kv_heads=6, vocab_size=64)
MESH = {"cp": 4, "context": "mesh"}

BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"cp": 8, "context": "ulysses"}, 64, 'set plan.context = "mesh" with plan.ulysses = 2 or 4, or "ring"'),
    ({"cp": 8, "context": "ulysses"}, 64, "12 heads can't be split by Ulysses over cp=8; the 2D mesh can cut them"),
    ({"cp": 4, "tp": 2, "context": "ulysses"}, 64, "6 heads of each tp rank (12 over tp=2) can't be split by Ulysses"),
    ({"cp": 8, "context": "mesh", "ulysses": 8}, 64, "can't be split over plan.ulysses = 8; it may be 1, 2 or 4."),
    ({**MESH, "ulysses": 3}, 64, "plan.ulysses = 3 can't divide plan.cp = 4 ranks evenly; it may be 1, 2 or 4."),
    ({"cp": 5, "context": "ulysses"}, 64, 'nor by the 2D mesh, since only 1 divides both; set plan.context = "ring"'),
    ({"cp": 8, "context": "mesh", "ulysses": 3}, 64, "it may be 1, 2 or 4."),
    ({"cp": 4, "context_inner": "ring"}, 64, "plan.context_inner = 'ring' belongs to the 2D mesh"),
    ({"cp": 4, "ulysses": 2}, 64, "belongs to the 2D mesh, but plan.context = 'ring'; set plan.context = \"mesh\""),
    ({**MESH, "ulysses": 2, "inner_ring": 4}, 64, "can't divide a ring of 2 evenly; it may be 1 or 2."),
    ({"cp": 4, "context": "token-ring", "inner_ring": 2}, 64, "makes a double ring, but plan.context = 'token-ring'"),
    ({"cp": 4, "context": "rings"}, 64, "plan.context = 'rings' is none of 'ring', 'ulysses'"),
    ({"cp": 4, "context_layout": "striped"}, 64, "plan.context_layout = 'striped' is none of 'zigzag', 'contiguous'"),
    ({"cp": 4, "linear_context": "lasp"}, 64, "plan.linear_context = 'lasp' is none of 'all-gather', 'ring'"),
    ({"cp": 4, "context_inner": "heads"}, 64, "plan.context_inner = 'heads' is none of 'ulysses', 'ring'"),
    (
        {"cp": 4},
        7,
        "sequence_length = 7 is shorter than the ring: it can't be cut over cp=4 (zigzag gives each",
    ),
    (
        {"cp": 4, "context": "ulysses", "context_keep": True},
        64,
        "brings none that would travel again; set plan.context",
    ),
    ({"cp": 4, "context_keep": True, "recompute": "full"}, 64, "plan.recompute = 'full' gives up what is kept"),
    ({"cp": 4}, 7, "set plan.cp to at most 3, or take at least 8 tokens."),
    ({"cp": 4, "tp": 2, "context_layout": "contiguous"}, 6, "in pieces of at least tp=2 tokens over cp=4; set"),
]


def run_of(plan: dict[str, Any], length: int, **model: Any) -> RunSpec:
    spec = MODEL if not model else ModelSpec(**model)
    return RunSpec(model=spec, plan=PlanSpec(**plan), training=TrainingSpec(sequence_length=length))


@pytest.mark.parametrize(("plan", "length", "message"), BAD)
def test_what_cannot_be_cut_is_said(plan: dict[str, Any], length: int, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        check(run_of(plan, length), data=False)
    assert message in str(found.value)


@pytest.mark.parametrize("plan", [{"cp": 4}, {**MESH, "ulysses": 2, "tp": 3}, {"cp": 6, "context": "ulysses"}])
def test_what_can_be_cut_passes(plan: dict[str, Any]) -> None:
    check(run_of(plan, 63), data=False)


def test_what_this_version_cannot_cut() -> None:
    with pytest.raises(UnsupportedError, match="can't be compiled"):
        check(run_of({"cp": 2, "compile": "blocks"}, 64), data=False)
    check(run_of({"cp": 2, "compile": "regions"}, 64), data=False)
    with pytest.raises(UnsupportedError, match="linear and delta layers send their states"):
        check(run_of({"cp": 2, "compile": "regions"}, 64, attention=("linear",)), data=False)
    with pytest.raises(UnsupportedError, match="a foreign model's attention can't be cut over cp"):
        check(run_of({"cp": 2}, 64, family="foreign", module="somewhere:build"), data=False)


@pytest.mark.parametrize(
    ("backend", "run", "message"),
    [
        ("flex", {"run": RunSettings(device="cpu")}, 'no backward on a CPU .*set it to "auto", "flash" or "blockwise"'),
        ("flash", {"model": replace(MODEL, dropout=0.1)}, 'model.dropout = 0.1 does; set it to "auto" or "blockwise"'),
        ("flash", {"run": RunSettings(device="cuda"), "training": TrainingSpec(dtype="float64")}, "kernel of CUDA"),
        ("flex", {"training": TrainingSpec(dtype="float64")}, 'takes training.dtype = "float64"; set it to "auto" or'),
        ("flash", {"model": ModelSpec(family="foreign", module="somewhere:build")}, "attention of its own; leave it"),
    ],
)
def test_a_backend_that_cannot_attend_is_refused(backend: str, run: dict[str, Any], message: str) -> None:
    spec = RunSpec(**{"model": MODEL, "plan": PlanSpec(attention_backend=backend), **run})
    with pytest.raises(UnsupportedError, match=message):
        check(spec, data=False)
    with pytest.raises(UnsupportedError, match=r'plan\.compile = "regions", which leaves it out'):
        check(RunSpec(model=MODEL, plan=PlanSpec(attention_backend="flash", compile="blocks")), data=False)
    with pytest.raises(ConfigError, match="'flesh' is none of 'auto', 'blockwise', 'flash', 'flex'"):
        check(replace(spec, plan=PlanSpec(attention_backend="flesh")), data=False)
    linear = RunSpec(model=replace(MODEL, attention=("linear",)), plan=PlanSpec(attention_backend="flash"))
    with pytest.raises(ConfigError, match="read by softmax layers only"):
        check(linear, data=False)

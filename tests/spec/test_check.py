"""Each thing that can't work is refused before a process starts, with the fact, the reason and the choices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from stretto.spec.check import check
from stretto.spec.cluster import DeviceGroup
from stretto.spec.data import SourceSpec
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import MODELS
from stretto.spec.resolve import resolve_text
from stretto.spec.run import RunSpec
from stretto.spec.stages import balanced, stages_of

GROUP = DeviceGroup(
    name="four",
    num_nodes=1,
    devices_per_node=4,
    memory_bytes=8e10,
    peak_flops_bfloat16=3e14,
    memory_bytes_per_second=2e12,
    link_bytes_per_second=3e11,
    network_bytes_per_second=2.5e10,
)
TWELVE = {"model.hidden_size": 96, "model.num_heads": 12, "model.num_kv_heads": 12, "model.intermediate_size": 192}


def run_with(**changes: Any) -> RunSpec:
    """The tiny model on the embedded corpus, global batch 16, with ``section__key`` changed."""
    run = resolve_text("[model]\nname = 'tiny'\n[data]\npath = 'stdlib'\n[training]\nglobal_batch_size = 16")
    for dotted, value in changes.items():
        section, key = dotted.replace(".", "__").split("__")
        run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **{key: value})})
    return run


def said(error: type[Exception], *, world_size: int | None = None, **changes: Any) -> str:
    """The message of the error that the changed run gives."""
    with pytest.raises(error) as caught:
        check(run_with(**changes), world_size=world_size)
    return str(caught.value)


GOOD: list[dict[str, Any]] = [
    {},
    {"plan.pp": 4},
    {"plan.pp": 2, "plan.stages": (1, 3)},
    {"plan.pp": 2, "plan.chunks": 2, "plan.schedule": "interleaved"},
    {"plan.tp": 4, "plan.zero": 3},
    {"plan.dp_replicate": 2, "plan.dp_shard": 2, "plan.micro_batch_size": 4},
    {"plan.schedule": "gpipe", "plan.recompute": "selective", "plan.compile": "blocks"},
    {"training.schedule": "wsd", "training.warmup_steps": 20, "training.decay_steps": 80},
    {"training.eval_every": 5, "data.validation_fraction": 0.1},
    {**TWELVE, "plan.tp": 3, "training.sequence_length": 129},
]


@pytest.mark.parametrize("changes", GOOD)
def test_what_works_passes(changes: dict[str, Any]) -> None:
    run = run_with(**changes)
    check(run)
    check(run, world_size=run.plan.num_ranks)


BAD: list[tuple[dict[str, Any], str]] = [
    # degrees
    ({"plan.pp": 0}, "plan.pp = 0 must be at least 1."),
    ({"plan.dp_shard": -1}, "plan.dp_shard = -1 must be at least 1."),
    ({"plan.micro_batch_size": 0}, "plan.micro_batch_size = 0 must be at least 1."),
    # tensor parallel
    ({**TWELVE, "plan.tp": 8}, "12 heads can't be split over tp=8; tp may be 1, 2 or 4."),
    (
        {**TWELVE, "plan.tp": 8, "training.sequence_length": 192},
        "12 heads can't be split over tp=8; tp may be 1, 2, 3, 4, 6 or 12.",
    ),
    ({"plan.tp": 8}, "4 key/value heads can't be split over tp=8; tp may be 1, 2 or 4."),
    (
        {"plan.tp": 4, "model.intermediate_size": 90},
        "intermediate_size = 90 can't be split over tp=4; tp may be 1 or 2.",
    ),
    ({"plan.tp": 2, "training.sequence_length": 33}, "sequence_length = 33 can't be split over tp=2"),
    # pipeline
    ({"plan.pp": 5}, "plan.pp=5 makes 5 pipeline stages, but the model has 4 layers"),
    (
        {"plan.pp": 2, "plan.chunks": 3, "plan.schedule": "interleaved"},
        "plan.pp=2 x plan.chunks=3 makes 6 pipeline stages, but the model has 4 layers",
    ),
    ({"plan.pp": 2, "plan.stages": (4,)}, "names 1 stages, but plan.pp=2 has 2; write 2 numbers, for example [2, 2]."),
    ({"plan.pp": 2, "plan.stages": (3, 2)}, "holds 5 layers, but the model has 4; the numbers must sum to 4"),
    ({"plan.pp": 2, "plan.stages": (4, 0)}, "has a stage without layers; each needs at least 1"),
    ({"plan.schedule": "1f1"}, "'; did you mean '1f1b'?"),
    (
        {"plan.schedule": "interleaved"},
        "plan.schedule = 'interleaved' can't order plan.chunks = 1 stage per rank; "
        "set plan.chunks = 2, 3 and so on up to 64, or plan.schedule = gpipe, 1f1b,",
    ),
    ({"plan.chunks": 2}, "can't order plan.chunks = 2 stages per rank; set plan.chunks = 1, or plan.schedule = inter"),
    ({"plan.pp": 2, "plan.schedule": "dualpipe-v"}, "set plan.chunks = 2, or plan.schedule = "),
    ({"plan.zero": 4}, "plan.zero = 4 is none of 1, 2, 3."),
    ({"plan.recompute": "some"}, "plan.recompute = 'some' is none of 'none', 'selective', 'full'"),
    # batch
    ({"plan.dp_replicate": 3}, "global_batch_size = 16 can't be divided into micro-batches of 1 over dp=3"),
    ({"plan.dp_replicate": 3}, "take a multiple of 3, for example 15 or 18."),
    ({"plan.micro_batch_size": 32}, "take a multiple of 32, for example 32."),
    # positions, sizes
    ({"training.sequence_length": 1024}, "sequence_length = 1024 is longer than the model's 512 positions"),
    (
        {"model.num_heads": 7, "model.num_kv_heads": 7},
        "hidden_size = 64 can't be divided among 7 heads; take 2 or 4 or 8",
    ),
    ({"model.num_kv_heads": 3}, "8 heads can't share 3 key/value heads evenly; model.num_kv_heads may be 1, 2, 4, 8."),
    ({"model.num_layers": 10**9}, "model.num_layers = 1000000000 is too large; it may be up to 65,536."),
    ({"model.head_dim": 0}, "model.head_dim = 0 must be above 0"),
    ({"model.head_dim": 7}, "A head of 7 can't be rotated in pairs"),
    ({"model.num_kv_heads": 0}, "model.num_kv_heads = 0 must be above 0."),
    ({"model.num_layers": 0}, "model.num_layers = 0 must be above 0."),
    ({"model.dropout": 1.0}, "model.dropout = 1.0 must be at least 0 and below 1."),
    ({"model.sliding_window": 0}, "model.sliding_window = 0 must be at least 1"),
    ({"model.family": "gpt3"}, "did you mean 'gpt2'?"),
    ({"model.family": "foreign"}, "needs model.module = "),
    ({"model.family": "foreign", "model.module": "file.py"}, "needs model.module = "),
    ({"model.module": "file.py:build"}, "is read with model.family = \"foreign\" only, not with 'llama'"),
    ({"checkpoint.resume": ""}, "checkpoint.resume = '' doesn't exist"),
    ({"model.weights": "nowhere"}, "model.weights = 'nowhere' is no folder"),
    # training
    ({"training.dtype": "float16"}, "training.dtype = 'float16' is none of 'float64', 'float32', 'bfloat16'"),
    ({"training.steps": 0}, "training.steps = 0 must be above 0."),
    ({"training.global_batch_size": 0}, "training.global_batch_size = 0 must be above 0."),
    ({"training.learning_rate": -1.0}, "training.learning_rate = -1.0 must not be negative."),
    ({"training.learning_rate": float("nan")}, "training.learning_rate = nan must be a finite number."),
    ({"training.min_learning_rate": 1.0}, "min_learning_rate = 1 is above training.learning_rate = 0.0003"),
    ({"training.beta2": 1.0}, "training.beta2 = 1.0 must be at least 0 and below 1."),
    ({"training.schedule": "cosin"}, "did you mean 'cosine'?"),
    ({"training.warmup_steps": 101}, "warmup_steps = 101 is longer than the run's 100 steps"),
    (
        {"training.schedule": "wsd", "training.warmup_steps": 50, "training.decay_steps": 51},
        "together longer than the run's 100 steps",
    ),
    # data
    ({"data.path": None}, "There is no corpus: write data.path"),
    ({"data.path": "no/such/corpus"}, "The corpus 'no/such/corpus' doesn't exist"),
    ({"data.tokenizer": "no.json"}, "The tokenizer 'no.json' doesn't exist"),
    ({"data.tokenizer": "byte"}, "did you mean 'bytes'?"),
    (
        {"model.vocab_size": 256},
        "The bytes tokenizer has 257 ids (256 bytes and end of text), but model.vocab_size = 256",
    ),
    ({"data.validation_fraction": 1.5}, "data.validation_fraction = 1.5 must be at least 0 and below 1."),
    ({"training.eval_every": 5}, "data.validation_fraction = 0 holds none out"),
    # run and checkpoint
    ({"run.device": "gpu"}, "run.device = 'gpu' is none of 'auto', 'cpu', 'cuda'"),
    ({"run.seed": -1}, "run.seed = -1 must be at least 0"),
    ({"run.dir": ""}, "run.dir is empty"),
    ({"run.silent_seconds": 0.0}, "run.silent_seconds = 0.0 must be above 0."),
    ({"checkpoint.every": -1}, "checkpoint.every = -1 must not be negative."),
    ({"checkpoint.resume": "no/such/checkpoint"}, "checkpoint.resume = 'no/such/checkpoint' doesn't exist"),
    # nothing that is empty, and no number beyond what can be
    ({"data.path": ""}, "The path of a corpus is empty"),
    ({"data.tokenizer": ""}, "The tokenizer '' doesn't exist"),
    ({"model.weights": ""}, "model.weights = '' is no folder"),
    ({"data.path": None, "data.sources": (SourceSpec(path="stdlib", weight=float("nan")),)}, "weight = nan must be a"),
    ({"training.global_batch_size": 2**41}, "is too large; it may be up to 1,099,511,627,776 sequences."),
    ({"plan.dp_replicate": 10**14}, "plan.dp_replicate = 100000000000000 is more than can be"),
    # machines
    ({"cluster.num_nodes": 0}, "cluster.num_nodes = 0 must be positive."),
    ({"cluster.link_bytes_per_second": -1.0}, "cluster.link_bytes_per_second = -1.0 must not be negative"),
    ({"cluster.peak_flops_bfloat16": float("inf")}, "cluster.peak_flops_bfloat16 = inf must be a finite number."),
    ({"cluster.module_devices": -2}, "cluster.module_devices = -2 must not be negative"),
    ({"cluster.module_devices": 2}, "cluster.module_bytes_per_second doesn't say how fast"),
    ({"cluster.num_nodes": 10**12}, "has 1000000000000 devices; there may be up to 16,777,216."),
    ({"cluster.groups": (GROUP,)}, "cluster.groups have 4 devices together, but cluster.num_nodes x"),
    (
        {"cluster.groups": (dataclasses.replace(GROUP, memory_bytes=float("nan")),)},
        "cluster.groups[0].memory_bytes = nan must be a finite number.",
    ),
    (
        {"cluster.groups": (dataclasses.replace(GROUP, link_bytes_per_second=-1.0),)},
        "cluster.groups[0].link_bytes_per_second = -1.0 must not be negative",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_work_is_said(changes: dict[str, Any], message: str) -> None:
    assert message in said(ConfigError, **changes)


@pytest.mark.parametrize(("key", "value"), [("ep", 4)])
def test_what_this_version_cannot_do(key: str, value: Any) -> None:
    assert "not in this version; set plan." in said(UnsupportedError, **{f"plan.{key}": value})


def test_choices_for_tp_all_work() -> None:
    """Following the advice leads to a run that passes."""
    message = said(ConfigError, **TWELVE, **{"plan.tp": 7})
    offered = [int(word) for word in message.rpartition("may be ")[2].strip(".").replace("or", ",").split(",")]
    for tp in offered:
        check(run_with(**TWELVE, **{"plan.tp": tp}))


def test_world_size_that_does_not_fit() -> None:
    pipelined = {"plan.pp": 2, "plan.dp_replicate": 2}
    message = said(ConfigError, world_size=8, **pipelined)
    assert "The plan needs 4 ranks (pp 2 x dp_replicate 2), but the number of processes is 8" in message
    assert "start 4 processes, or set plan.dp_replicate = 4." in message
    message = said(ConfigError, world_size=6, **pipelined)
    assert "take 4 processes (plan.dp_replicate = 2) or 8 processes (plan.dp_replicate = 4)" in message
    assert "start 1 process, or" in said(ConfigError, world_size=2)


def test_sources(tmp_path: Path) -> None:
    one = tmp_path / "a.txt"
    one.write_text("a")
    check(resolve_text(f"[model]\nname = 'tiny'\n[[data.sources]]\npath = '{one}'"))
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.weight = 0\.0 must be above 0"):
        check(resolve_text(f"[model]\nname = 'tiny'\n[[data.sources]]\npath = '{one}'\nweight = 0"))
    with pytest.raises(ConfigError, match="one or the other"):
        check(resolve_text(f"[data]\npath = 'stdlib'\n[[data.sources]]\npath = '{one}'"))


def test_gpt2_refuses_what_it_would_ignore() -> None:
    gpt2 = MODELS["tiny-gpt2"]
    for key, value in (("num_kv_heads", 4), ("head_dim", 4), ("sliding_window", 8), ("qk_norm", True)):
        run = dataclasses.replace(run_with(), model=dataclasses.replace(gpt2, **{key: value}))
        with pytest.raises(ConfigError, match=r"gpt2|model\.head_dim"):
            check(run)
    with pytest.raises(ConfigError, match="longer than the model's 512 positions"):
        check(dataclasses.replace(run_with(**{"training.sequence_length": 513}), model=gpt2))


def test_foreign_sizes_are_left_to_its_module() -> None:
    foreign = ModelSpec(family="foreign", module="file.py:build", num_heads=7)
    check(dataclasses.replace(run_with(**{"plan.pp": 8, "plan.tp": 2}), model=foreign))
    with pytest.raises(ConfigError, match="can't be split over tp=2"):
        check(dataclasses.replace(run_with(**{"plan.tp": 2, "training.sequence_length": 33}), model=foreign))


def test_cluster_too_small_for_the_plan() -> None:
    run = dataclasses.replace(run_with(**{"plan.dp_replicate": 16}), cluster=cluster_preset("h100"))
    with pytest.raises(ConfigError, match="needs 16 ranks, but cluster 'h100' has 8 devices"):
        check(run)
    check(dataclasses.replace(run, cluster=cluster_preset("h100:16")))


def test_verify_needs_no_corpus() -> None:
    check(run_with(**{"data.path": None}), data=False)


def test_balanced_stages() -> None:
    for layers in range(1, 30):
        for stages in range(1, layers + 1):
            split = balanced(layers, stages)
            assert sum(split) == layers and len(split) == stages
            assert max(split) - min(split) <= 1
            assert split[0] >= split[-1] == min(split)
            assert max(split) in split[1:-1] or stages <= 2
    assert balanced(5, 4) == (1, 2, 1, 1)


def test_stages_of_a_run() -> None:
    assert stages_of(run_with(**{"plan.pp": 3})) == (1, 2, 1)
    assert stages_of(run_with(**{"plan.pp": 2, "plan.stages": (3, 1)})) == (3, 1)

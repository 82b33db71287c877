"""BigScience's published runs on V100s: which fitted and which ran out of memory.  Nothing is fitted to them.

Megatron-LM and Megatron-DeepSpeed, 16-bit: parameters and gradients 2 bytes each, masters, moments and 32-bit copies of
the gradients 16, or 10 where moments have 8 bits; fused scores, dropout, the vocabulary divided over tp.  A V100 shows
31.75 or 15.78 GiB to a program; nodes hold four.  Runs with offload, and models whose shape isn't told, are left out.
"""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.planner_rows import Row
from stretto.planner.stack import KernelStack
from stretto.planner.workload import Workload
from stretto.spec.cluster import ClusterSpec
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec

SHAPES = {1.3: (24, 2048, 16), 18.0: (40, 6144, 48), 39.0: (48, 8192, 64), 52.0: (64, 8192, 64), 104.0: (64, 11600, 80)}
"""Billions of parameters: layers, width, heads."""
GIBIBYTES = {"V100-32GB": 31.75, "V100-16GB": 15.78}
BATCH = 1024
"""Sequences of a step where the source doesn't tell."""


def v100_rows(truth: Path) -> list[Row]:
    """Rows whose model and plan are told; those that ran have a step time."""
    with (truth / "bigscience_v100_layouts.csv").open() as file:
        return [_v100(line) for line in csv.DictReader(file) if _told(line)]


def _told(line: dict[str, str]) -> bool:
    return bool(float(line["model_b"]) in SHAPES and line["mbs"] and not line["offload"] and "HF" not in line["note"])


def _v100(line: dict[str, str]) -> Row:
    layers, width, heads = SHAPES[float(line["model_b"])]
    number = {name: int(line[name]) for name in ("seq_len", "dp", "tp", "pp", "mbs")}
    zero = int(line["zero"].rstrip("?") or 0)
    plan = PlanSpec(
        pp=number["pp"],
        tp=number["tp"],
        dp_shard=number["dp"] if zero else 1,
        dp_replicate=1 if zero else number["dp"],
        zero=3 if zero == 3 else 1,
        micro_batch_size=number["mbs"],
        recompute="full" if line["act_ckpt"] == "yes" else "none",
    )
    model = ModelSpec(
        family="gpt2",
        vocab_size=50304,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=heads,
        max_positions=number["seq_len"],
        tied_embeddings=True,
        dropout=0.1,
    )
    gpus = number["dp"] * number["tp"] * number["pp"]
    cluster = _cluster(line["system"], gpus)
    share = number["dp"] * number["mbs"]
    stack = KernelStack(
        attention="fused",
        sequence_parallel=False,
        gradient_bytes=2,
        reduction_bytes=2,
        optimizer_bytes=10 if "8-bit" in line["note"] else 16,
    )
    work = Workload(
        model=model,
        plan=plan,
        cluster=cluster,
        sequence_length=number["seq_len"],
        global_batch_size=max(1, int(line["gbs"] or BATCH) // share) * share,
        stack=stack,
    )
    return Row(
        work=work,
        seconds=float(line["step_time_s"]) if line["status"] == "ok" else None,
        model=f"{line['model_b']}B",
        kernels=line["system"],
        layout=f"mbs={plan.micro_batch_size} tp={plan.tp} pp={plan.pp} zero={zero} gpus={gpus}",
    )


def _cluster(system: str, gpus: int) -> ClusterSpec:
    """Four V100s (SXM2 data sheet; 100 Gb/s each to other nodes); only their memory is judged."""
    return ClusterSpec(
        name="v100",
        num_nodes=max(1, gpus // 4),
        devices_per_node=4,
        memory_bytes=GIBIBYTES[system] * 2**30,
        peak_flops_bfloat16=125e12,
        memory_bytes_per_second=0.9e12,
        link_bytes_per_second=150e9,
        network_bytes_per_second=12.5e9,
    )

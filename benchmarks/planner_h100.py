"""The planner's H100 shares: fitted on MosaicML's runs of one code on A100s and H100s, checked on torchtitan's.

    python -m benchmarks.planner_h100 --truth DIR [--rows]

DIR holds mosaic_mpt_fsdp_h100_a100.csv, llm-foundry's throughput table; torchtitan's runs stand here (``TITAN``).

What is the same on both machines (the code, its kernels, what is assumed of it) cancels: the share that matrix products
reach on an H100 is the one at which its runs of at most 2,048 tokens come out as far off as the same models' runs on
A100s.  Longer sequences aren't asked: the Triton kernel of these runs gets slower with them on either machine.

Assumed of llm-foundry (its throughput table): MPT models, FSDP, full recompute where the table says so, gradients
reduced in 16 bit and under the backward pass.  Of torchtitan (December 2024 and June 2025): H100s of 500 W with slower
memory, which none of our presets is; "selective" there recomputes every other product, here it isn't counted.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stretto.planner.calibration import Calibration, published
from stretto.planner.stack import KernelStack
from stretto.planner.step import step_time
from stretto.planner.workload import Workload
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset

WIDTHS = {
    "760m": (1536, 12),
    "1b": (2048, 16),
    "3b": (2560, 20),
    "7b": (4096, 32),
    "13b": (5120, 40),
    "30b": (7168, 56),
}
"""Width and heads of MPT models; the layers follow from the parameters."""
WIDTHS["70b"] = (8192, 64)
VOCABULARY = 50368
LONGEST = 2048
"""Tokens up to which runs are fitted."""
STACK = KernelStack(overlapped_reduction=True, reduction_bytes=2)
TITAN = (
    ("llama-3-8b", 8, 1, 2, 16, "none", 6667.0),
    ("llama-3-8b", 128, 1, 2, 256, "none", 6514.0),
    ("llama-3-70b", 256, 8, 16, 512, "full", 597.3),
    ("llama-3-8b", 64, 8, 12, 96, "none", 4378.0),
)
"""Model, devices, tp, micro-batch, batch, recompute, tokens a second and device: the bfloat16 runs, 8,192 tokens."""
Run = tuple[str, Workload, float]
"""What, the workload, and its measured seconds."""


def mosaic(truth: Path, preset: str) -> list[Run]:
    """bfloat16 FSDP runs on one kind of machine."""
    found = []
    with (truth / "mosaic_mpt_fsdp_h100_a100.csv").open() as file:
        for line in csv.DictReader(file):
            if not line["gpu"].startswith(f"{preset}_80") or (line["mp_mode"], line["precision"]) != (
                "DEFAULT",
                "amp_bf16",
            ):
                continue
            if line["model"].removeprefix("mpt_") not in WIDTHS:
                continue
            width, heads = WIDTHS[line["model"].removeprefix("mpt_")]
            length, devices, batch = (int(line[key]) for key in ("seq_len", "gpus", "gbs_seqs"))
            layers = round((float(line["params"]) - (VOCABULARY + length) * width) / (12 * width**2))
            model = ModelSpec(
                family="gpt2", vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width,
                num_layers=layers, num_heads=heads, tied_embeddings=True, max_positions=length,
            )  # fmt: skip
            plan = PlanSpec(
                dp_shard=devices, zero=3 if line["fsdp_sharding"] == "FULL_SHARD" else 2,
                micro_batch_size=int(line["mbs"]), recompute="full" if line["act_ckpt"] == "True" else "none",
            )  # fmt: skip
            work = Workload(
                model=model, plan=plan, cluster=cluster_preset(f"{preset}:{devices}"), sequence_length=length,
                global_batch_size=batch, stack=STACK,
            )  # fmt: skip
            name = f"{line['model']}, {length} tokens, {devices} devices, micro-batch {plan.micro_batch_size}"
            found.append((name, work, batch * length / float(line["tokens_per_s"])))
    return found


def titan() -> list[Run]:
    """torchtitan's published bfloat16 runs."""
    found = []
    for name, devices, tp, micro, batch, recompute, rate in TITAN:
        plan = PlanSpec(tp=tp, dp_shard=devices // tp, zero=3, micro_batch_size=micro, recompute=recompute)
        work = Workload(
            model=model_preset(name), plan=plan, cluster=cluster_preset(f"h100:{devices}", memory_bytes=96e9),
            sequence_length=8192, global_batch_size=batch, stack=KernelStack(overlapped_reduction=True),
        )  # fmt: skip
        found.append((f"{name}, {devices} devices, tp {tp}", work, batch * 8192 / (rate * devices)))
    return found


def errors(runs: Sequence[Run], calibration: Calibration) -> list[float]:
    """Relative error of each estimate."""
    return [step_time(work, calibration).total / seconds - 1 for _, work, seconds in runs]


def by_model(runs: Sequence[Run], calibration: Calibration) -> dict[tuple[int, int, str], float]:
    """Error by width, tokens and recompute, of the smallest number of devices."""
    found: dict[tuple[int, int, str], tuple[int, float]] = {}
    for (_, work, _), error in zip(runs, errors(runs, calibration), strict=True):
        if work.sequence_length <= LONGEST:
            key = (work.model.hidden_size, work.sequence_length, work.plan.recompute)
            found[key] = min(found.get(key, (work.plan.num_ranks, error)), (work.plan.num_ranks, error))
    return {key: error for key, (_, error) in found.items()}


def main() -> None:
    """Fit, then print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, required=True, help="folder with mosaic_mpt_fsdp_h100_a100.csv")
    parser.add_argument("--rows", action="store_true", help="print every run")
    options = parser.parse_args()
    ours, other = mosaic(options.truth, "h100"), mosaic(options.truth, "a100")
    before = by_model(other, Calibration())
    gaps = {}
    for hundredth in range(55, 82):
        after = by_model(ours, replace(published("h100"), matmul=hundredth / 100))
        gaps[hundredth / 100] = statistics.median(after[key] - before[key] for key in after if key in before)
    best = min(gaps, key=lambda share: abs(gaps[share]))
    print(f"matmul {best} on H100: off by {gaps[best]:+.1%} more than the same {len(before)} models on A100")
    calibration = published("h100")
    large = [run for run in ours if run[1].model.hidden_size >= 5120 and run[1].sequence_length <= LONGEST]
    sets = {"MosaicML, 13B and more, <= 2,048 tokens": large, "MosaicML, all": ours, "torchtitan, 500 W": titan()}
    for name, runs in sets.items():
        found = errors(runs, calibration)
        print(
            f"{name}: median error {statistics.median(found):+.1%}, {min(found):+.1%} to {max(found):+.1%}", len(runs)
        )
    for name, work, seconds in [*ours, *titan()] if options.rows else []:
        print(f"  {name}: {seconds:.3f} s, {step_time(work, calibration).total / seconds - 1:+.1%}")


if __name__ == "__main__":
    main()

"""A run over clips, cut over cp 1, 2 and 4: what ranks keep, send and take, beside what the planner says of it.

    OMP_NUM_THREADS=1 python -m benchmarks.video_run [--calibration calibration.toml]      # under a minute

Real training of a small spatial-temporal transformer, in as many processes.  Asked: losses those of one rank, bytes
those of the closed form (asserted), peak activations within 10% of a share, tracked memory within 2% of the planner's.
With a calibration of this machine (``stretto diagnose --calibrate``) the step that was predicted, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, command, machine
from benchmarks.processes import free_port
from stretto.data import ClipLoader, Share, prepare_clips
from stretto.parallel.sequence.switch import CutSwitch
from stretto.planner.prediction import predict
from stretto.planner.request import Request
from stretto.planner.video import switch_volume
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec
from stretto.spec.model import ModelSpec, VideoSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter, passing_bytes, persistent_bytes
from stretto.trainer.session import Session

CLIP = VideoSpec(frames=16, patches=64, channels=8)
MODEL = ModelSpec(
    family="video", hidden_size=192, intermediate_size=768, num_layers=4, num_heads=6, initial_std=0.02, video=CLIP
)
BATCH, WARM = 2, 2
"""Clips of a step, and steps that aren't timed."""
ASSUMED = ClusterSpec(
    peak_flops_bfloat16=5e10, memory_bytes_per_second=1e10, link_bytes_per_second=2e9, network_bytes_per_second=2e9
)
"""The machine, where it wasn't measured; no time is shown then."""


def run_of(ranks: int, calibration: str | None) -> RunSpec:
    """The run over ``ranks``."""
    cluster = ClusterSpec(calibration=calibration) if calibration else ASSUMED
    return RunSpec(
        model=MODEL,
        cluster=cluster,
        plan=PlanSpec(cp=ranks, context="switch"),
        training=TrainingSpec(global_batch_size=BATCH, sequence_length=CLIP.tokens),
        data=DataSpec(path="waves"),
    )


def measure(rank: int, run: RunSpec, steps: int) -> dict[str, Any]:
    """One rank's figures."""
    session = Session.start(run, rank)
    loader = ClipLoader(prepare_clips(run.data, CLIP), Share(global_batch_size=BATCH, micro_batch_size=1))
    meter, seconds, losses = ActivationMeter(session), [], []
    switch: Any = session.model.stack.blocks[0]
    switch = switch.switch if isinstance(switch.switch, CutSwitch) else None
    for step in range(1, WARM + steps + 1):
        batches, before = loader.step(step), 0 if switch is None else switch.wire.sent
        begun = time.perf_counter()
        if step == 1:
            with meter.watch():
                losses.append(session.train_step(step, batches).loss)
            sent = 0 if switch is None else switch.wire.sent - before
        else:
            losses.append(session.train_step(step, batches).loss)
        seconds.append(time.perf_counter() - begun)
    memory = persistent_bytes(session) + passing_bytes(session) + meter.peak_bytes
    if run.plan.cp > 1:
        volume = switch_volume(Request(run=run).work(run.plan), rank, element_bytes=4)
        assert sent == BATCH * (volume.forward + volume.backward), (sent, volume)
    step_s = statistics.median(seconds[WARM:])
    return {"activations": meter.peak_bytes, "memory": memory, "sent": sent, "step_s": step_s, "losses": losses}


def work(rank: int, run: RunSpec, steps: int, port: int, queue: Any) -> None:
    """One rank."""
    torch.set_num_threads(1)
    if run.plan.cp > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=run.plan.cp)
    queue.put((rank, measure(rank, run, steps)))
    if run.plan.cp > 1:
        dist.barrier()
        dist.destroy_process_group()


def row_of(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train over so many ranks; figures of the fullest and slowest."""
    run = run_of(ranks, args.calibration)
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    context = start_processes(
        work, (run, args.steps, free_port(), queue), nprocs=ranks, start_method="fork", join=False
    )
    found = dict(queue.get() for _ in range(ranks))
    while not context.join():
        continue
    predicted = predict(run)
    assert predicted is not None
    row = {key: max(one[key] for one in found.values()) for key in ("activations", "memory", "sent", "step_s")}
    row |= {"cp": ranks, "losses": found[0]["losses"], "predicted_memory": predicted.memory.total}
    return row | ({"predicted_step_s": predicted.time.total} if args.calibration else {})


def main() -> None:
    """All degrees."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", help="of this machine; predicts seconds")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-write", dest="write", action="store_false", help="don't write benchmarks/results")
    args = parser.parse_args()
    rows = [row_of(ranks, args) for ranks in (1, 2, 4)]
    for row in rows:
        share = row["activations"] * row["cp"] / rows[0]["activations"]
        off = row["predicted_memory"] / row["memory"] - 1
        error = max(abs(a / b - 1) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        row |= {"share": share, "loss_error": error}
        told = f", {row['predicted_step_s']:.3f} s predicted" if "predicted_step_s" in row else ""
        print(
            f"cp {row['cp']}: activations {row['activations'] / 1e6:.1f} MB ({share:.3f} of a share), memory "
            f"{row['memory'] / 1e6:.1f} MB ({off:+.1%} predicted), {row['sent']:,} bytes sent, step "
            f"{row['step_s']:.3f} s{told}, losses within {error:.0e}"
        )
        assert error < 1e-5 and share < 1.1 and abs(off) < 0.02, row
    if args.write:
        record = {"command": command("video_run"), "machine": machine(), "settings": vars(args), "rows": rows}
        (RESULTS / "video_run.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

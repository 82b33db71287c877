"""Published training runs as workloads that the planner can estimate.

Nothing here is fitted.  What the sources leave open is assumed once, for every row of a source:

* Llama on A100 (Hagemann et al. 2023): 16-bit gradients (the 13B model on one GPU, tp=1 and pp=1, doesn't fit with
  float32 ones), summed in float32; ZeRO-1; logits gathered over tp; inputs that sequence parallelism gathers are kept;
  stages hand over with blocking sends and receives; and a pipeline cut into equal numbers of items, where the
  embedding, the last norm and the head are items like a layer (what DeepSpeed calls uniform): so does the code that
  the authors published (Aleph-Alpha/scaling).  One ring uses one adapter of a node: the fitted rows ask for it.  An
  A100-80GB shows 79.15 GiB to a program.
* Megatron-LM (Narayanan et al. 2021, table 1): fused scores, fused norms, sharded logits, no sequence parallelism, no
  ZeRO, full recompute, gradients summed in 16 bit, under the backward pass where torch's DDP did it; a network that
  routes adaptively (Selene), as if flows were split in 8.
* MegaScale (2024, table 2): flash attention and sequence parallelism for both systems, micro-batches of one;
  only MegaScale overlaps the reduction of gradients (its section 3.2).  Each uplink is as wide as two downlinks
  (section 3.6), which halves what collisions cost: as if flows were split in 16.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from stretto.planner.stack import Attention, KernelStack
from stretto.planner.workload import Workload
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset

A100_BYTES = 79.15 * 2**30
ITEMS = {"first": 1, "last": 2}
"""Items that an end of the pipeline holds besides layers: the embedding; the last norm and the head."""
KERNELS: dict[str, Attention] = {
    "flash_attention": "flash-1",
    "flash_attentionv1.0.8": "flash-1",
    "flash_attention2": "flash-2",
    "fused": "fused",
    "torch": "unfused",
}
FITTED_MODEL = "llama_13B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published run."""

    work: Workload
    seconds: float | None
    """Measured step time; None where it ran out of memory."""
    model: str
    kernels: str
    """The source's name of the kernel stack."""
    layout: str
    """Micro-batch, tp, pp and what else tells rows of a group apart."""
    flow_splits: int | None = None
    """Where the source's network spreads its flows; None: as the calibration says."""

    @property
    def fitted(self) -> bool:
        """Whether the calibration may see it."""
        return self.model == FITTED_MODEL

    @property
    def group(self) -> tuple[str, int, int, str]:
        """Rows of a group answer the same question: which layout for this model, these machines and kernels."""
        return self.model, self.work.sequence_length, self.work.plan.num_ranks, self.kernels


def llama_rows(truth: Path) -> list[Row]:
    """Runs that finished or ran out of memory; those that failed for other reasons are left out."""
    with (truth / "llama_a100_layouts.csv").open() as file:
        return [_llama(line) for line in csv.DictReader(file) if line["status"] in ("ok", "oom")]


def _llama(line: dict[str, str]) -> Row:
    number = {
        name: int(line[name]) for name in ("layers", "hidden", "ffn", "heads", "seq_len", "mbs", "tp", "pp", "dp")
    }
    recompute = line["act_ckpt"] != "disabled"
    sequence_parallel = line["seq_parallel"] == "True"
    plan = PlanSpec(
        pp=number["pp"],
        tp=number["tp"],
        dp_shard=number["dp"],
        micro_batch_size=number["mbs"],
        stages=uniform(number["layers"], number["pp"]),
        recompute="full" if recompute else "none",
    )
    model = ModelSpec(
        vocab_size=int(line["vocab_derived"]),
        hidden_size=number["hidden"],
        intermediate_size=number["ffn"],
        num_layers=number["layers"],
        num_heads=number["heads"],
        max_positions=number["seq_len"],
    )
    stack = KernelStack(
        attention=KERNELS[line["attn_kernel"]],
        fused_norm=line["rmsnorm_kernel"] == "True",
        sequence_parallel=sequence_parallel,
        sharded_messages=False,
        sharded_logits=False,
        gathers_again=False,
        blocking_messages=True,
        adapters_per_ring=1,
        gradient_bytes=2,
    )
    work = Workload(
        model=model,
        plan=plan,
        cluster=cluster_preset(f"a100:{line['gpus']}", memory_bytes=A100_BYTES),
        sequence_length=number["seq_len"],
        global_batch_size=int(line["global_batch"]),
        stack=stack,
    )
    layout = f"mbs={number['mbs']} tp={number['tp']} pp={number['pp']}"
    layout += (" recompute" if recompute else "") + (" sp" if sequence_parallel else "")
    return Row(
        work=work,
        seconds=float(line["step_time_s"]) if line["status"] == "ok" else None,
        model=line["model"],
        kernels=line["kernel_raw"],
        layout=layout,
    )


def uniform(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage where all stages hold as many items, those that are left over going first."""
    if num_stages == 1:
        return (num_layers,)
    base, rest = divmod(num_layers + sum(ITEMS.values()), num_stages)
    items = [base + (stage < rest) for stage in range(num_stages)]
    items[0] -= ITEMS["first"]
    items[-1] -= ITEMS["last"]
    return tuple(items)


def megatron_rows(truth: Path) -> list[Row]:
    """Table 1 of SC21; step time from the FLOPs and rate that the table states."""
    with (truth / "megatron_sc21_table1.csv").open() as file:
        return [_megatron(line) for line in csv.DictReader(file)]


def _megatron(line: dict[str, str]) -> Row:
    chunks = int(line["virtual_stages"])
    plan = PlanSpec(
        pp=int(line["pp"]),
        tp=int(line["tp"]),
        dp_replicate=int(line["dp"]),
        schedule="interleaved" if chunks > 1 else "1f1b",
        chunks=chunks,
        micro_batch_size=int(line["mbs_from_repo"]),
        recompute="full",
    )
    sizes = {"hidden": int(line["hidden"]), "layers": int(line["layers"]), "heads": int(line["heads"])}
    stack = KernelStack(
        attention="fused",
        sequence_parallel=False,
        reduction_bytes=2,
        overlapped_reduction=line["ddp_impl_from_repo"] == "torch",
    )
    work = _gpt(sizes, plan, stack, batch=int(line["global_batch"]), vocab=int(line["vocab"]))
    return Row(
        work=work,
        seconds=float(line["step_time_s_derived"]),
        model=f"{line['params_b']}B",
        kernels="Megatron-LM 2021",
        layout=f"tp={plan.tp} pp={plan.pp} gpus={plan.num_ranks}",
        flow_splits=8,
    )


def megascale_rows(truth: Path) -> list[Row]:
    """Table 2 of MegaScale: 175B, 256 to 12,288 GPUs, two systems."""
    with (truth / "megascale_175b_530b.csv").open() as file:
        return [_megascale(line) for line in csv.DictReader(file) if line["iter_time_s"]]


def _megascale(line: dict[str, str]) -> Row:
    gpus, tp, pp = int(line["gpus"]), int(line["tp"]), int(line["pp"])
    plan = PlanSpec(
        pp=pp, tp=tp, dp_shard=gpus // (tp * pp), zero=2, schedule="interleaved", chunks=int(line["interleave"])
    )
    sizes = {"hidden": 12288, "layers": 96, "heads": 96}
    stack = KernelStack(overlapped_reduction=line["system"] == "MegaScale")
    work = _gpt(sizes, plan, stack, batch=int(line["global_batch"]), vocab=int(line["vocab"]))
    return Row(
        work=work,
        seconds=float(line["iter_time_s"]),
        model="175B",
        kernels=line["system"],
        layout=f"gpus={gpus}",
        flow_splits=16,
    )


def _gpt(sizes: dict[str, int], plan: PlanSpec, stack: KernelStack, *, batch: int, vocab: int) -> Workload:
    """A GPT at 2,048 tokens on A100s."""
    model = ModelSpec(
        family="gpt2",
        vocab_size=vocab,
        hidden_size=sizes["hidden"],
        intermediate_size=4 * sizes["hidden"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        tied_embeddings=True,
    )
    cluster = cluster_preset(f"a100:{plan.num_ranks}", memory_bytes=A100_BYTES)
    return Workload(model=model, plan=plan, cluster=cluster, sequence_length=2048, global_batch_size=batch, stack=stack)

"""How the run is laid out on the devices: the parallel degrees and what goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Recompute = Literal["none", "selective", "full"]
Compile = Literal["none", "regions", "blocks"]
Asynchronous = Literal["none", "plain", "stash", "spike", "predict", "predict-spike"]
Option = bool | int | float | str | tuple[int | float | str, ...]
"""What an option of a schedule family may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """All degrees and choices of a run.  Ranks needed = pp x tp x cp x dp_replicate x dp_shard."""

    pp: int = 1
    """Pipeline ranks."""
    tp: int = 1
    """Tensor-parallel ranks; activations between attention and feed-forward are split over the sequence."""
    cp: int = 1
    """Context-parallel ranks: they cut sequences between them, and share states like those of ``dp_shard``."""
    context: str = "ring"
    """How attention is cut over cp: ``ring``, ``ulysses``, ``mesh`` (Ulysses inside, rings outside), ``token-ring`` or
    ``all-gather``; of family = video ``switch`` (cut by frames or by patches, whichever a layer doesn't look along)."""
    context_layout: str = "zigzag"
    """Which tokens a cp rank holds: ``zigzag`` (equal work under a causal mask) or ``contiguous``."""
    ulysses: int = 1
    """Cp ranks that share heads, if ``context`` is ``mesh``."""
    context_inner: str = "ulysses"
    """Which of the two dims of ``mesh`` has neighbouring ranks: ``ulysses`` or ``ring``."""
    inner_ring: int = 1
    """Seats of a double ring's inner level, for example the ranks of a node; 1: a plain ring."""
    context_keep: bool = False
    """Keep the keys and values that came from other ranks for backward, instead of sending them again: a third less
    of a ring's messages, for memory that grows with the whole sequence."""
    context_groups: str = "static"
    """Which ranks share a document: ``static``, those of cp, or ``dynamic``: as many as it needs of all that read data,
    decided for every step."""
    context_tokens: int | None = None
    """Tokens of a micro-batch on a rank, at most, with dynamic groups; None: as many as with static ones."""
    attention_backend: str = "auto"
    """Who computes attention, block by block: ``blockwise`` (plain PyTorch), ``flash`` (fused kernels), ``flex``
    (FlexAttention, CUDA) or ``auto``: under cp the fastest that is exact, else torch's choice for whole rows.  One that
    is named serves cp = 1 too, and documents and windows then need no table of all pairs."""
    linear_context: str = "all-gather"
    """How the states of linear and delta layers travel over cp: ``all-gather`` (LASP-2) or ``ring`` (LASP)."""
    ep: int = 1
    """Expert-parallel ranks; so far 1."""
    dp_replicate: int = 1
    """Data-parallel replicas that hold whole parameters."""
    dp_shard: int = 1
    """Data-parallel ranks that share states between them as ``zero`` says."""
    schedule: str = "1f1b"
    """Pipeline schedule family of ``stretto simulate --list``, any but ``forward-only``; ``auto`` searches for one."""
    chunks: int = 1
    """Stages per pipeline rank and replica of the model; a family may ask for a certain number."""
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    """Options of the schedule family: ``[plan.options] waves = 2``, as ``stretto simulate --option`` takes them."""
    passes: tuple[str, ...] = ()
    """Changes made to the schedule, in order, each as ``stretto simulate --pass`` takes it: ``"2bp:when=idle"``."""
    schedule_file: str | None = None
    """Play the schedule of this file instead of a family's; relative to the working directory."""
    memory_limit: float | None = None
    """Activation memory that no rank may exceed, in micro-batches over a rank's whole share of the layers."""
    micro_batch_size: int = 1
    """Sequences per micro-batch; micro-batches = global batch / (dp x this)."""
    stages: tuple[int, ...] | None = None
    """Layers of each stage, in order, may be uneven; None: balanced, the ends lightest."""
    zero: Literal[1, 2, 3] = 1
    """What dp_shard splits: 1 optimizer state, 2 also gradients, 3 also parameters (ZeRO)."""
    shard_parameters: int | None = None
    """Data ranks (those of cp count) that divide parameters between them (AMSP); None: as ``zero`` says."""
    shard_gradients: int | None = None
    """Data ranks that divide gradients, a multiple of those that divide parameters; None: as ``zero`` says, or as many
    as divide parameters."""
    shard_optimizer: int | None = None
    """Data ranks that divide optimizer states, a multiple of those that divide gradients; None: dp_shard x cp, or
    as many as divide gradients."""
    recompute: Recompute = "none"
    """``selective`` recomputes attention scores, ``full`` whole blocks, in the backward pass."""
    offload: bool = False
    """Keep activations in host memory between forward and backward, all that fit into the time (pass ``offload``);
    with dynamic groups those of documents that else need more ranks, as far as their own compute hides it."""
    compile: Compile = "none"
    """What torch.compile makes kernels of: ``regions``, all between linear layers, whose weight gradients stay apart
    (W); ``blocks``, whole layers, whose backward then isn't split: I does all of it, W nothing."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """Who runs what was compiled: ``inductor`` makes kernels and needs a C++ compiler (on CUDA Triton), ``aot_eager``
    runs the same graphs operation by operation, which is no faster and needs nothing."""
    optimizer_barrier: bool = True
    """Whether all pipeline ranks wait for the gradient norm before they update; false: they update at once and take it
    back in the next step's warm-up where clipping or a non-finite gradient demands it.  The results are the same."""
    asynchronous: Asynchronous = "none"
    """Anything but none changes the mathematics: each stage updates after every micro-batch, with gradients of older
    weights (pipelined backpropagation), met by nothing, stashed weights, spike compensation, weight prediction."""

    @property
    def num_ranks(self) -> int:
        """Processes that this plan needs."""
        return self.pp * self.tp * self.cp * self.dp_replicate * self.dp_shard

    @property
    def dp(self) -> int:
        """Data-parallel degree: how many ways the global batch is divided."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks; a schedule file may have any number, which ``stages`` then says."""
        if self.schedule_file is not None and self.stages is not None:
            return len(self.stages)
        return self.pp * self.chunks

"""What this version can run, as data: the checks, the command line and the documentation read it here."""

from __future__ import annotations

FAMILIES = ("llama", "gpt2", "video", "foreign")
"""Model families (``model.family``)."""
ONE, TWO, ANY, SEVERAL, EVEN = range(1, 2), range(2, 3), range(1, 65), range(2, 65), range(2, 65, 2)
SCHEDULES = {
    "gpipe": ONE,
    "1f1b": ONE,
    "interleaved": SEVERAL,
    "group-interleaved": ANY,
    "breadth-first": ANY,
    "zb-h1": ONE,
    "zb-h2": ONE,
    "zb-auto": ONE,
    "v-min": TWO,
    "v-half": TWO,
    "zb-v": TWO,
    "hanayo": EVEN,
    "chimera": ONE,
    "bitpipe": TWO,
    "dualpipe": ONE,
    "dualpipe-v": TWO,
    "zeropp": ANY,
    "modular": ANY,
    "skip-pipe": ANY,
    "auto": ANY,
}
"""Pipeline schedule families that the runtime executes (``plan.schedule``), and the stages per rank and replica of the
model that each can have (``plan.chunks``)."""
AXES = ("pp", "tp", "cp", "dp_replicate", "dp_shard")
"""Axes of the plan that may be larger than 1."""
LATER_AXES = ("ep",)
"""Axes that a plan names already and that must be 1 in this version."""
SWITCH = "switch"
"""How clips are cut over cp: by one of their dims, which changes inside each layer."""
CONTEXT = ("ring", "ulysses", "mesh", "token-ring", "all-gather", SWITCH)
"""How attention can be cut over cp (``plan.context``)."""
CONTEXT_LAYOUTS = ("zigzag", "contiguous")
"""Which tokens a cp rank can hold (``plan.context_layout``)."""
CONTEXT_INNER = ("ulysses", "ring")
"""What of the 2D mesh can lie inside (``plan.context_inner``)."""
KEEPING_CONTEXT = ("ring", "mesh", "all-gather")
"""Ways to cut attention in which keys come that can be kept (``plan.context_keep``)."""
CONTEXT_GROUPS = ("static", "dynamic")
"""Which ranks can share a document (``plan.context_groups``)."""
GROUPED_CONTEXT = ("ring", "ulysses", "mesh", "token-ring", "all-gather")
"""How attention can be cut over dynamic groups."""
ATTENTION_BACKENDS = ("auto", "blockwise", "flash", "flex")
"""Who can compute attention (``plan.attention_backend``)."""
GROUPED_SCHEDULES = ("1f1b", "gpipe")
"""Schedules of dynamic groups: they take any number of micro-batches."""
LINEAR_CONTEXT = ("all-gather", "ring")
"""How the states of linear layers travel over cp (``plan.linear_context``)."""
ATTENTION = ("softmax", "linear", "delta")
"""What a layer can have in the place of attention (``model.attention``)."""
ZERO_STAGES = (1, 2, 3)
"""What dp_shard can split (``plan.zero``)."""
DTYPES = ("float64", "float32", "bfloat16")
"""Arithmetic of the model (``training.dtype``)."""
RECOMPUTE = ("none", "selective", "full")
"""What the backward pass recomputes (``plan.recompute``)."""
COMPILE = ("none", "regions", "blocks")
"""What is compiled (``plan.compile``)."""
COMPILE_BACKENDS = ("inductor", "aot_eager")
"""Who runs it (``plan.compile_backend``)."""
RATE_SCHEDULES = ("constant", "cosine", "wsd")
"""Learning rate over the steps (``training.schedule``)."""
DEVICES = ("auto", "cpu", "cuda")
"""Where ranks compute (``run.device``)."""
OFFLOAD = True
"""Whether activations can be kept in host memory (``plan.offload``)."""
PLANNER = True
"""Whether ``auto`` in ``[plan]`` can be filled in."""
EMBEDDED_CORPUS = "stdlib"
"""The value of ``data.path`` that stands for the text every machine has."""
EMBEDDED_CLIPS = "waves"
"""The value of ``data.path`` that stands for clips that every machine can draw."""
CLIP_SUFFIXES = (".npy", ".safetensors")
"""Files of clips, by their names' ends."""
BYTES_TOKENIZER = "bytes"
"""The value of ``data.tokenizer`` that needs no file."""
BYTES_VOCABULARY = 257
"""Ids of the bytes tokenizer: 256 bytes and end_of_text."""

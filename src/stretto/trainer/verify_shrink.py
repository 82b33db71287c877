"""A run made small enough to verify on a laptop, with everything kept that a plan can get wrong.

             user's run                         shrunk
layers       (10, 12, 12, 10)                   (1, 2, 2, 1)        who holds more than whom
heads        64 query, 8 key/value, tp=4        32 query, 4 kv      the ratio; several per rank
vocabulary   128256                             61                  odd: tp ranks hold unequal shares
batch        1024 sequences of 8192             a few of 16         unequal stages of the pipeline's fill
kept         family, ties, norms, biases, window, rope scaling, packing, dropout, schedule, chunks, recompute,
             zero, every degree
arithmetic   float64, AdamW's epsilon 1e-3 and a clip that is always active (both so that a gradient
             of wrong size shows in the weights; with the usual 1e-8 AdamW divides the size away)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from stretto.spec.check import check
from stretto.spec.cluster import ClusterSpec
from stretto.spec.front import FILL, fills, front_layers, wholly_frozen
from stretto.spec.model import ModelSpec, VideoSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import Arrangement, pool_of
from stretto.spec.stages import balanced, stages_of
from stretto.spec.states import SHARD_KEYS, of_plan
from stretto.spec.training import TrainingSpec
from stretto.trainer.freezing import matches

MAX_RANKS = 16
"""Processes that a verification starts at most."""
STEPS = 3
"""Optimizer steps."""
LEARNING_RATE = 0.01
"""Of the shrunk run: large enough that each step's weights differ visibly from the last's."""
SEARCH_SECONDS = 1
"""What the search for the shrunk run's schedule may take, where the plan asks for one."""
AHEAD = 2
"""Layers of a frozen front that is computed a step ahead, at most."""
VOCABULARY = 61
"""Prime, so that no tp degree divides it."""
LENGTH = 16
"""Tokens of a sequence, about."""
OFFLOADED = 5
"""Layers where dynamic groups offload: two stay at least."""
SLOW = 1.0
"""FLOP/s of a device that hides all copies to its host."""
REDUCIBLE = ("dp_replicate", "dp_shard", "pp", "cp", "tp")
"""Axes in the order in which equal degrees are lowered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """A small run and what of the plan could not be kept."""

    run: RunSpec
    """The run to verify."""
    notes: tuple[str, ...]
    """One phrase for each thing that the small run leaves out."""


def shrink(run: RunSpec) -> Shrunk:
    """Make ``run`` small.

    A foreign model stays as it is (its sizes are in its own code); only the batch and the sequences shrink.
    """
    notes = []
    plan = reduce_degrees(run.plan)
    for axis in REDUCIBLE:
        before, after = getattr(run.plan, axis), getattr(plan, axis)
        if before != after:
            notes.append(f"plan.{axis} = {after} instead of {before}, to need {plan.num_ranks} processes")
    if plan.compile != "none":
        notes.append("nothing is compiled")
        plan = replace(plan, compile="none")
    if plan.asynchronous != "none":
        notes.append(
            f'plan.asynchronous = "none" instead of "{plan.asynchronous}": gradients of older weights equal no '
            "one rank's; compared is the same pipeline with one update a step"
        )
        plan = replace(plan, asynchronous="none")
    if not plan.optimizer_barrier:
        notes.append("each update is validated at the end of its step, not in the next one's warm-up")
    foreign = run.model.family == "foreign"
    if foreign:
        stages = run.plan.stages if plan.pp == run.plan.pp else None
    else:
        stages = shrink_stages(pick_stages(stages_of(run), plan.num_stages))
    if plan.schedule == "auto" and plan.schedule_file is None:
        plan = replace(plan, options={**plan.options, "time_budget": SEARCH_SECONDS})
    cluster = ClusterSpec()
    if plan.context_groups == "dynamic" and plan.offload:
        stages, cluster = (OFFLOADED,) * plan.pp, replace(cluster, peak_flops_float32=SLOW)
    plan = replace(plan, stages=stages, micro_batch_size=min(plan.micro_batch_size, 2))
    training = shrink_training(run, plan)
    if plan.context_groups == "dynamic":  # little room, so that documents need groups of several sizes
        room = -(-training.sequence_length // min(plan.cp * plan.dp, 4))
        plan = replace(plan, context_tokens=room)
    model = run.model if foreign else shrink_model(run, plan, training)
    if model.video is not None:
        training = replace(training, sequence_length=model.video.tokens)
    if fills(plan):
        ahead = min(front_layers(run), AHEAD)
        if ahead < front_layers(run):
            notes.append(f"{ahead} frozen layers in front instead of {front_layers(run)}")
        model, plan = replace(model, num_layers=model.num_layers + ahead), _timed_by_default(plan)
        training = replace(training, freeze=_frozen_front(training.freeze, front_layers(run), ahead))
    if training.freeze:
        training = replace(training, freeze=_frozen_still(model, training.freeze))
    small = replace(run, run=replace(run.run, device="cpu"), model=model, cluster=cluster, plan=plan, training=training)
    check(small, data=False)
    return Shrunk(run=small, notes=tuple(notes))


def reduce_degrees(plan: PlanSpec) -> PlanSpec:
    """Halve the largest degree until at most MAX_RANKS ranks are needed; none that is above 1 falls below 2."""
    # The order in a schedule file is for as many pipeline ranks as there are.
    whole = plan
    reducible = [axis for axis in REDUCIBLE if axis != "pp" or plan.schedule_file is None]
    while plan.num_ranks > MAX_RANKS and any(getattr(plan, axis) > 2 for axis in reducible):
        axis = max(reducible, key=lambda name: getattr(plan, name))
        plan = replace(plan, **{axis: max(2, getattr(plan, axis) // 2)})
    plan = _states_still(plan, whole)
    plan = replace(plan, ulysses=math.gcd(plan.ulysses, pool_of(plan)))
    return replace(plan, inner_ring=math.gcd(plan.inner_ring, Arrangement.of_group(plan, pool_of(plan)).seats))


def _states_still(plan: PlanSpec, before: PlanSpec) -> PlanSpec:
    """``plan`` with states divided like those of ``before``: factors that differed differ still, if ranks allow it."""
    if all(getattr(before, key) is None for key in SHARD_KEYS):
        return plan
    old, ranks, last = of_plan(before), plan.dp * plan.cp, (1, 1)
    given: dict[str, Any] = {}
    for key, factor in zip(SHARD_KEYS, (old.parameters, old.gradients, old.optimizer), strict=True):
        larger = [n for n in range(last[1] + 1, ranks + 1) if ranks % n == 0 and n % last[1] == 0] or [last[1]]
        widest = factor == before.dp * before.cp
        last = (factor, larger[-1 if widest else 0] if factor > last[0] else last[1])
        given[key] = last[1]
    return replace(plan, **given)


def pick_stages(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """``count`` of the stages, evenly apart, the last among them; not all equal if the whole wasn't.

    >>> pick_stages((2, 5, 2, 2), 2)
    (5, 2)
    """
    picked = [layers[(i + 1) * len(layers) // count - 1] for i in range(count)]
    if len(set(picked)) == 1:
        picked[0] = next((n for n in layers if n != picked[-1]), picked[0])
    return tuple(picked)


def shrink_stages(layers: tuple[int, ...]) -> tuple[int, ...]:
    """The fewest layers, in proportion where four a stage suffice, that keep which stage holds more than which.

    >>> shrink_stages((10, 12, 12, 10)), shrink_stages((1, 4, 2)), shrink_stages((8, 8)), shrink_stages((1, 50, 2))
    ((1, 2, 2, 1), (1, 4, 2), (2, 2), (1, 3, 2))
    """
    largest = max(layers)
    sizes = sorted(set(layers))
    for most in range(min(largest, 2), min(largest, 4) + 1):
        small = {n: max(1, n * most // largest) for n in sizes}
        if len(set(small.values())) == len(sizes):
            return tuple(small[n] for n in layers)
    return tuple(sizes.index(n) + 1 for n in layers)


def shrink_model(run: RunSpec, plan: PlanSpec, training: TrainingSpec) -> ModelSpec:
    """Narrow, with the ratio of query to key/value heads and several heads per tp rank where there were."""
    model, length = run.model, training.sequence_length
    if model.video is not None:
        return shrink_clips(model, model.video, plan)
    kv_heads = plan.tp * min(2, max(1, model.kv_heads // run.plan.tp))
    shared = Arrangement.of_group(plan, pool_of(plan)).ulysses
    kv_heads *= shared // math.gcd(shared, kv_heads // plan.tp * (model.num_heads // model.kv_heads))
    num_heads = kv_heads * (model.num_heads // model.kv_heads)
    head_size = 8 if num_heads <= 8 else 4
    hidden = inner = num_heads * head_size
    beyond = model.hidden_size - model.num_heads * model.head_size
    if beyond:
        hidden = inner + int(math.copysign(4, beyond))
    window = model.sliding_window
    if window is not None:
        before = run.training.sequence_length
        window = length if window >= before else max(min(window, 2), window * length // before)
    return replace(
        model,
        name="verify",
        path=None,
        weights="random",
        vocab_size=max(VOCABULARY, 8 * plan.tp - 3),
        hidden_size=hidden,
        intermediate_size=plan.tp * -(-3 * inner // (2 * plan.tp)),
        num_layers=sum(plan.stages or ()),
        num_heads=num_heads,
        num_kv_heads=None if model.num_kv_heads is None else kv_heads,
        head_dim=None if model.head_dim is None else head_size,
        max_positions=length + 8,
        sliding_window=window,
        initial_std=0.2,
        attention=tuple(dict.fromkeys(model.attention)),  # of a pattern, each kind once
    )


def shrink_clips(model: ModelSpec, clip: VideoSpec, plan: PlanSpec) -> ModelSpec:
    """The same for clips, with frames and patches that aren't equally many on each cp rank."""
    clip = VideoSpec(frames=2 * plan.cp + 1, patches=2 * plan.cp + 3, channels=min(clip.channels, 3))
    return replace(
        model,
        name="verify",
        hidden_size=16,
        intermediate_size=24,
        num_layers=sum(plan.stages or ()),
        num_heads=2,
        initial_std=0.2,
        video=clip,
    )


def shrink_training(run: RunSpec, plan: PlanSpec) -> TrainingSpec:
    """Few, short sequences; enough micro-batches to fill the pipeline twice, with the same remainder."""
    before = run.training
    # Several tokens for each piece of a zigzag, and not equally many.
    units = max(2, LENGTH // plan.tp, 4 * plan.cp - 1 if plan.cp > 1 else 0)
    most = 2 * plan.pp if plan.pp > 1 else 3
    count = run.num_microbatches
    if count > most and plan.schedule_file is None:
        count = most + count % plan.pp
    return replace(
        before,
        steps=STEPS,
        global_batch_size=count * plan.micro_batch_size * plan.dp,
        sequence_length=min(before.sequence_length, plan.tp * units) // plan.tp * plan.tp,
        dtype="float64",
        learning_rate=LEARNING_RATE,
        min_learning_rate=LEARNING_RATE / 10 if before.min_learning_rate else 0.0,
        warmup_steps=min(before.warmup_steps, 1),
        decay_steps=min(before.decay_steps, 1),
        eps=1e-3,
        clip_norm=0.1 if before.clip_norm else 0.0,
        eval_every=0,
    )


def _frozen_still(model: ModelSpec, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns of frozen parameters that the small model has, too: it has fewer layers."""
    if model.family == "foreign":
        return patterns
    import torch

    from stretto.models.build import build_model

    with torch.device("meta"):
        stack: Any = build_model(model)
    names = [name for name, _ in stack.named_parameters()]
    fewer = tuple(pattern for pattern in patterns if any(matches(name, (pattern,)) for name in names))
    return fewer if not all(matches(name, fewer) for name in names) else ()


def _frozen_front(patterns: tuple[str, ...], front: int, ahead: int) -> tuple[str, ...]:
    """Patterns that freeze ``ahead`` layers in front instead of ``front``, and the same of the rest."""
    there = ("inputs", *(f"blocks.{i}" for i in range(front)))
    rest = (pattern for pattern in patterns if not any(wholly_frozen(part, (pattern,)) for part in there))
    return ("inputs.*", *(f"blocks.{i}.*" for i in range(ahead)), *rest)


def _timed_by_default(plan: PlanSpec) -> PlanSpec:
    """The plan, whose bubbles are filled by the default times: those of another number of layers don't fit."""
    return replace(plan, passes=tuple(FILL if text.startswith(f"{FILL}:") else text for text in plan.passes))


def layers_of(run: RunSpec) -> tuple[int, ...]:
    """Layers of each stage of a shrunk run, for messages."""
    return run.plan.stages or balanced(run.model.num_layers, run.plan.num_stages)

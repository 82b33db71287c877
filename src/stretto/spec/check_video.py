"""The checks of a run over clips (``model.family = "video"``): how a clip is cut, what can't go with it, its files."""

from __future__ import annotations

from pathlib import Path

from stretto.spec import capabilities
from stretto.spec.check_values import check_held_out, one_of
from stretto.spec.data import DataSpec
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.front import FILL, passes_named
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec

OF_TEXT: tuple[str, ...] = ("tokenizer", "format", "suffixes", "text_field", "messages_field", "train_on")
OF_TEXT += ("packing", "isolate_documents", "cache")
"""Keys of [data] that only text has."""
OF_ENDS = ("vocabulary", FILL)
"""Passes that need a vocabulary, or an embedding of tokens."""


def check_video(run: RunSpec) -> None:
    """ConfigError where clips can't be cut so; UnsupportedError for what this family can't be combined with."""
    clip, plan, length = run.model.video, run.plan, run.training.sequence_length
    assert clip is not None, "checked with the model"
    if length != clip.tokens:
        raise ConfigError(
            f"training.sequence_length = {length}, but a clip has {clip.frames} frames x {clip.patches} patches = "
            f"{clip.tokens} tokens; set training.sequence_length = {clip.tokens}."
        )
    for met, what, choice in _impossible(plan):
        if met:
            raise UnsupportedError(f'{what} can\'t go with model.family = "video" in this version; {choice}.')
    one_of("plan.context", plan.context, capabilities.CONTEXT)
    if plan.cp == 1:
        return
    if plan.context != capabilities.SWITCH:
        raise ConfigError(
            f"plan.context = {plan.context!r} cuts rows of text; clips are cut over cp={plan.cp} by frames or by "
            f'patches: set plan.context = "{capabilities.SWITCH}".'
        )
    for size, what in ((clip.frames, "frames"), (clip.patches, "patches")):
        if size < plan.cp:
            raise ConfigError(
                f"{size} {what} can't be cut over cp={plan.cp}, because each rank needs one; "
                f"plan.cp may be at most {min(clip.frames, clip.patches)}."
            )


def _impossible(plan: PlanSpec) -> tuple[tuple[bool, str, str], ...]:
    """What can't go with clips: whether it is there, its name, what to do."""
    usual = PlanSpec()
    passes = [name for name in passes_named(plan) if name in OF_ENDS]
    mesh = next((key for key in ("ulysses", "inner_ring", "context_inner") if differs(plan, usual, key)), None)
    return (
        (plan.tp > 1, f"plan.tp = {plan.tp}", "set plan.tp = 1 and use pp, cp, dp_replicate and dp_shard"),
        (
            plan.schedule == "skip-pipe",
            'plan.schedule = "skip-pipe"',
            "take another: the first layer alone begins with frames",
        ),
        (bool(passes), f"The pass {passes[0] if passes else ''}", "leave it out"),
        (plan.context_groups != "static", 'plan.context_groups = "dynamic"', "leave it out, since clips are equal"),
        (plan.context_tokens is not None, f"plan.context_tokens = {plan.context_tokens}", "leave it out"),
        (mesh is not None, f"plan.{mesh}", f'leave it out: plan.context = "{capabilities.SWITCH}" has no ring'),
        (plan.context_keep, "plan.context_keep", "leave it out: no keys travel that backward would need again"),
        (
            plan.attention_backend != "auto",
            f"plan.attention_backend = {plan.attention_backend!r}",
            "leave it out: whole frames and whole patches go through the fused kernels",
        ),
        (plan.recompute == "selective", 'plan.recompute = "selective"', 'set it to "none" or "full"'),
        (plan.compile != "none", f'plan.compile = "{plan.compile}"', 'set plan.compile = "none"'),
        (plan.asynchronous != "none", f'plan.asynchronous = "{plan.asynchronous}"', "leave it out"),
    )


def differs(plan: PlanSpec, usual: PlanSpec, key: str) -> bool:
    """Whether a key isn't what it is by default."""
    return bool(getattr(plan, key) != getattr(usual, key))


def check_clips(run: RunSpec) -> None:
    """Files of clips that exist, and nothing that only text has."""
    data = run.data
    paths = [data.path] if data.path is not None else [source.path for source in data.sources]
    files = f'.npy or .safetensors files of clips, or "{capabilities.EMBEDDED_CLIPS}" for clips that are drawn'
    if not paths:
        raise ConfigError(f"There are no clips: set data.path to {files}.")
    if data.path is not None and data.sources:
        raise ConfigError("data.path and data.sources are both written; clips come from one or the other.")
    for key in OF_TEXT:
        if getattr(data, key) != getattr(DataSpec(), key):
            raise ConfigError(f'data.{key} has no meaning for clips (model.family = "video"); leave it out.')
    for path in paths:
        if path != capabilities.EMBEDDED_CLIPS and not (path and Path(path).expanduser().exists()):
            raise ConfigError(
                f"The clips {path!r} don't exist (paths are relative to the working directory, {Path.cwd()}); "
                f"name {files}."
            )
    check_held_out(run)

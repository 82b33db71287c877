"""What a run must be to train asynchronously (``plan.asynchronous``): held against what the method needs."""

from __future__ import annotations

from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.run import RunSpec
from stretto.spec.states import of_plan

PLAIN = {
    "schedule": "1f1b",
    "chunks": 1,
    "dp_shard": 1,
    "cp": 1,
    "recompute": "none",
    "offload": False,
    "compile": "none",
    "optimizer_barrier": True,
    "passes": (),
    "schedule_file": None,
}
"""What the plan must say besides."""


def check_asynchronous(run: RunSpec) -> None:
    """ConfigError for what contradicts updates after every micro-batch, UnsupportedError for what isn't there yet."""
    method, training = run.plan.asynchronous, run.training
    if method == "none":
        return
    told = f'plan.asynchronous = "{method}"'
    if training.optimizer != "sgd":
        raise ConfigError(
            f"{told} compensates delays of SGD with momentum, not of {training.optimizer}; "
            'set training.optimizer = "sgd" (and training.momentum), or plan.asynchronous = "none".'
        )
    if training.clip_norm:
        raise ConfigError(
            f"{told} updates each stage before the other stages' gradients exist, so there is no norm to clip by "
            f"(training.clip_norm = {training.clip_norm:g}); set training.clip_norm = 0."
        )
    for key, value in PLAIN.items():
        found = getattr(run.plan, key)
        if found != value:
            raise UnsupportedError(
                f"{told} needs plan.{key} = {_shown(value)} in this version, not {_shown(found)}; "
                'change it, or set plan.asynchronous = "none".'
            )
    if of_plan(run.plan).optimizer > 1:
        raise UnsupportedError(
            f"{told} updates whole parameters in this version; leave the plan.shard_ keys out, or set "
            'plan.asynchronous = "none".'
        )
    if run.plan.pp > 1 and run.model.tied_embeddings:
        raise UnsupportedError(
            f"{told} can't keep model.tied_embeddings = true equal on two pipeline ranks that update at different "
            'times; set model.tied_embeddings = false, or plan.asynchronous = "none".'
        )
    if training.dtype == "bfloat16" or training.freeze:
        raise UnsupportedError(
            f"{told} keeps versions of whole weights in their own type: training.dtype may be float32 or float64, and "
            "training.freeze must be empty in this version."
        )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value is None else f'"{value}"' if isinstance(value, str) else str(value)

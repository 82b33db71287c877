"""The checks of a plan that cuts sequences over cp: heads, lengths, and how its ranks can sit."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.spec import capabilities
from stretto.spec.check_groups import check_groups
from stretto.spec.check_values import one_of
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import Arrangement, pool_of


def check_context(run: RunSpec) -> None:
    """ConfigError where the plan's cp ranks can't cut the run's sequences; UnsupportedError for foreign models."""
    plan = run.plan
    one_of("plan.context", plan.context, capabilities.CONTEXT)
    if plan.context == capabilities.SWITCH:
        raise ConfigError(
            f"plan.context = {plan.context!r} cuts clips, which have two dims, and model.family = {run.model.family!r} "
            'has none; set plan.context = "ring", or take model.family = "video".'
        )
    one_of("plan.context_layout", plan.context_layout, capabilities.CONTEXT_LAYOUTS)
    one_of("plan.context_inner", plan.context_inner, capabilities.CONTEXT_INNER)
    one_of("plan.linear_context", plan.linear_context, capabilities.LINEAR_CONTEXT)
    check_groups(run)
    _backend(run)
    _seats(run)
    if plan.cp == 1:
        if plan.context == "mesh":  # of groups of their own for documents
            _heads(run)
        return
    if run.model.family == "foreign":
        raise UnsupportedError(
            f"plan.cp = {plan.cp}: a foreign model's attention can't be cut over cp, since it sees whole rows only; "
            "use pp, tp, dp_replicate or dp_shard, or a model of family llama or gpt2."
        )
    if plan.compile == "blocks":
        raise UnsupportedError(
            f'plan.cp = {plan.cp} and plan.compile = "blocks": attention that sends messages can\'t be compiled with '
            'the rest of its layer; set plan.compile = "regions", which leaves it out, or "none".'
        )
    if plan.compile != "none" and run.model.keeps_states:
        raise UnsupportedError(
            f'plan.cp = {plan.cp} and plan.compile = "{plan.compile}": linear and delta layers send their states in '
            'the middle of what would be compiled; set plan.compile = "none".'
        )
    _kept(plan)
    _heads(run)
    _length(run)


def _backend(run: RunSpec) -> None:
    """What a backend of attention lacks: a device, dropout of weights, models whose attention is their own."""
    name, plain = run.plan.attention_backend, 'set it to "auto" or "blockwise"'
    one_of("plan.attention_backend", name, capabilities.ATTENTION_BACKENDS)
    if name == "auto":
        return
    if run.model.family == "foreign":
        raise UnsupportedError(
            f"plan.attention_backend = {name!r}: a foreign model has attention of its own; leave it out."
        )
    if "softmax" not in run.model.attention:
        raise ConfigError(
            f"plan.attention_backend = {name!r} is read by softmax layers only, and model.attention has none; "
            "leave it out."
        )
    if name == "flex" and run.run.device == "cpu":
        raise UnsupportedError(
            "plan.attention_backend = 'flex', but FlexAttention has no backward on a CPU and run.device = \"cpu\"; "
            'set it to "auto", "flash" or "blockwise".'
        )
    if run.plan.compile == "blocks":
        raise UnsupportedError(
            f'plan.attention_backend = {name!r} and plan.compile = "blocks": attention that goes block by block can\'t '
            'be compiled with the rest of its layer; set plan.compile = "regions", which leaves it out, or "none".'
        )
    if run.training.dtype == "float64" and (name == "flex" or (name == "flash" and run.run.device == "cuda")):
        raise UnsupportedError(
            f'plan.attention_backend = {name!r}: no such kernel of CUDA takes training.dtype = "float64"; {plain}.'
        )
    if name != "blockwise" and run.model.dropout > 0:
        raise UnsupportedError(
            f"plan.attention_backend = {name!r} can't drop attention weights by their places in the row, as "
            f"model.dropout = {run.model.dropout:g} does; {plain}."
        )


def _seats(run: RunSpec) -> None:
    plan = run.plan
    if plan.context == "mesh":
        if plan.ulysses < 1 or pool_of(plan) % plan.ulysses:
            raise ConfigError(
                f"plan.ulysses = {plan.ulysses} can't divide {_pool_text(plan)} ranks evenly; "
                f"it may be {_either(_sharers(run))}."
            )
    elif plan.ulysses != 1:
        raise ConfigError(
            f"plan.ulysses = {plan.ulysses} belongs to the 2D mesh, but plan.context = {plan.context!r}; "
            'set plan.context = "mesh", or leave plan.ulysses out.'
        )
    if plan.context != "mesh" and plan.context_inner != "ulysses":
        raise ConfigError(
            f"plan.context_inner = {plan.context_inner!r} belongs to the 2D mesh, but plan.context = {plan.context!r}; "
            'set plan.context = "mesh", or leave plan.context_inner out.'
        )
    seats = Arrangement.of_group(plan, pool_of(plan)).seats
    if plan.inner_ring == 1:
        return
    if plan.context not in ("ring", "mesh"):
        raise ConfigError(
            f"plan.inner_ring = {plan.inner_ring} makes a double ring, but plan.context = {plan.context!r} has none; "
            'set plan.context = "ring" or "mesh", or leave plan.inner_ring out.'
        )
    if plan.inner_ring < 1 or seats % plan.inner_ring:
        raise ConfigError(
            f"plan.inner_ring = {plan.inner_ring} can't divide a ring of {seats} evenly; "
            f"it may be {_either(_divisors(seats))}."
        )


def _kept(plan: PlanSpec) -> None:
    """Whether there are keys to keep, and a backward that finds them."""
    if not plan.context_keep:
        return
    ways = _either([f'"{way}"' for way in capabilities.KEEPING_CONTEXT])
    if plan.context not in capabilities.KEEPING_CONTEXT:
        raise ConfigError(
            f"plan.context_keep keeps the keys that came from other ranks, but plan.context = {plan.context!r} brings "
            f"none that would travel again; set plan.context = {ways}, or leave plan.context_keep out."
        )
    if plan.recompute != "none":
        raise ConfigError(
            f"plan.context_keep keeps keys for backward, but plan.recompute = {plan.recompute!r} gives up what is "
            'kept; set plan.recompute = "none", or leave plan.context_keep out.'
        )


def _heads(run: RunSpec) -> None:
    plan, model = run.plan, run.model
    ulysses = plan.ulysses if plan.context == "mesh" else Arrangement.of(plan).ulysses
    heads = model.num_heads // plan.tp
    if heads % ulysses == 0:
        return
    over = f" of each tp rank ({model.num_heads} over tp={plan.tp})" if plan.tp > 1 else ""
    fitting = _sharers(run)
    if plan.context == "mesh":
        raise ConfigError(
            f"{heads} heads{over} can't be split over plan.ulysses = {ulysses}; it may be {_either(fitting)}."
        )
    ways = ', nor by the 2D mesh, since only 1 divides both; set plan.context = "ring"'
    if len(fitting) > 1:
        shared = _either(fitting[1:])
        ways = f'; the 2D mesh can cut them: set plan.context = "mesh" with plan.ulysses = {shared}, or "ring"'
    raise ConfigError(f"{heads} heads{over} can't be split by Ulysses over cp={plan.cp}{ways}, which needs no heads.")


def _length(run: RunSpec) -> None:
    plan, length = run.plan, run.training.sequence_length
    pieces = plan.cp * (2 if plan.context_layout == "zigzag" else 1)
    if length // plan.tp >= pieces:
        return
    each = " (zigzag gives each rank two pieces)" if plan.context_layout == "zigzag" else ""
    cut = f" in pieces of at least tp={plan.tp} tokens" if plan.tp > 1 else ""
    most = length // plan.tp // (pieces // plan.cp)
    may = f"set plan.cp to at most {most}" if most > 0 else "set plan.cp = 1"
    raise ConfigError(
        f"training.sequence_length = {length} is shorter than the ring: it can't be cut{cut} over cp={plan.cp}{each}; "
        f"{may}, or take at least {pieces * plan.tp} tokens."
    )


def _sharers(run: RunSpec) -> list[int]:
    """How many ranks that share a document may share heads."""
    heads = run.model.num_heads // run.plan.tp
    return [n for n in _divisors(pool_of(run.plan)) if heads % n == 0]


def _pool_text(plan: PlanSpec) -> str:
    return f"plan.cp = {plan.cp}" if plan.context_groups == "static" else f"the {pool_of(plan)}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _either(choices: Sequence[int | str]) -> str:
    texts = [str(number) for number in choices]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"

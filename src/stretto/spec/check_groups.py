"""The checks of a plan that gives each document ranks of its own (``plan.context_groups = "dynamic"``)."""

from __future__ import annotations

from stretto.spec import capabilities
from stretto.spec.check_values import one_of
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import Arrangement, group_sizes, memory_tokens, pool_of


def check_groups(run: RunSpec) -> None:
    """ConfigError where documents can't be placed; UnsupportedError for what dynamic groups can't be combined with."""
    plan = run.plan
    one_of("plan.context_groups", plan.context_groups, capabilities.CONTEXT_GROUPS)
    if plan.context_groups == "static":
        if plan.context_tokens is not None:
            raise ConfigError(
                f"plan.context_tokens = {plan.context_tokens} limits what dynamic groups place on a rank, but "
                'plan.context_groups = "static"; set it to "dynamic", or leave plan.context_tokens out.'
            )
        return
    foreign = run.model.family == "foreign"
    whole = (foreign, "a foreign model, which sees whole rows only", "use family llama or gpt2")
    for met, what, choice in (*_of_plan(plan), whole):
        if met:
            raise UnsupportedError(f'plan.context_groups = "dynamic" can\'t be combined with {what}; {choice}.')
    _memory(run)


def _of_plan(plan: PlanSpec) -> tuple[tuple[bool, str, str], ...]:
    usual = PlanSpec()
    order = (plan.chunks, plan.schedule_file, plan.passes, plan.options)
    plain = (usual.chunks, usual.schedule_file, usual.passes, usual.options)
    return (
        (
            plan.schedule not in capabilities.GROUPED_SCHEDULES,
            f"plan.schedule = {plan.schedule!r}, since steps differ in their micro-batches",
            f"it may be {' or '.join(capabilities.GROUPED_SCHEDULES)}",
        ),
        (
            plan.pp > 1 and not plan.optimizer_barrier,
            "plan.optimizer_barrier = false, whose warm-up is that of one schedule",
            "leave plan.optimizer_barrier out",
        ),
        (
            plan.context not in capabilities.GROUPED_CONTEXT,
            f"plan.context = {plan.context!r}",
            f"it may be {', '.join(capabilities.GROUPED_CONTEXT)}",
        ),
        (
            order != plain,
            "chunks, options, passes or a file of a schedule",
            "steps differ in their micro-batches; leave it out",
        ),
        (plan.context_keep, "plan.context_keep in this version", "leave plan.context_keep out"),
        (plan.compile != "none", f"plan.compile = {plan.compile!r} in this version", 'set plan.compile = "none"'),
        (plan.asynchronous != "none", f"plan.asynchronous = {plan.asynchronous!r}", "leave plan.asynchronous out"),
    )


def _memory(run: RunSpec) -> None:
    """The longest document must fit on the largest group that can share it."""
    plan, length = run.plan, run.training.sequence_length
    ranks, heads = pool_of(plan), run.model.num_heads // plan.tp
    most = next(n for n in group_sizes(ranks) if heads % Arrangement.of_group(plan, n).ulysses == 0)
    tokens = memory_tokens(plan, length)
    if tokens * most >= length:
        return
    whose = " (what the static mesh would hold)" if plan.context_tokens is None else ""
    said = f"plan.context_tokens = {tokens}{whose}"
    who = "1 rank" if most == 1 else f"{most} ranks"
    why = "" if most == ranks else f" (no larger group of the {ranks} can split {heads} heads)"
    raise ConfigError(
        f"{said} leaves no room for a document of training.sequence_length = "
        f"{length} tokens on {who}{why}; set it to at least {-(-length // most)}."
    )

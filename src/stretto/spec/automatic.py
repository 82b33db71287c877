"""``auto`` in a run file: what of the plan is left to the planner.

    plan = "auto"                        everything
    [plan]
    pp = 4                               a value that is written stays
    tp = "auto"                          as soon as one key says auto, whatever isn't written is filled in too

``schedule = "auto"`` is something else, a schedule that is searched for, ``stages = "auto"`` the balanced split, and
``attention_backend = "auto"`` whichever kernel can: none needs the planner.  Under ``plan = "auto"`` schedule and
stages are the planner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stretto.spec.fields import keys_of
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec

AUTO = "auto"
"""What stands for a value that is to be filled in."""
OWN_MEANING = ("schedule", "stages", "attention_backend")
"""Keys of the plan whose ``auto`` isn't the planner's."""

Planner = Callable[[RunSpec, Mapping[str, Any]], PlanSpec]
"""Fills in the plan of a run, in which all but the plan is settled, around the values that are written."""


def split_auto(raw: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A parsed run file without what is left to the planner, and whether anything is.

    >>> split_auto({"plan": {"pp": 4, "tp": "auto"}})
    ({'plan': {'pp': 4}}, True)
    """
    plan = raw.get("plan")
    if plan == AUTO:
        return {**raw, "plan": {}}, True
    if not isinstance(plan, Mapping):
        return raw, False
    left = [key for key in keys_of(PlanSpec) if key not in OWN_MEANING]
    # A misspelt key stays, to be refused later by its name.
    written = {key: value for key, value in plan.items() if value != AUTO or key not in left}
    if len(written) == len(plan):
        return raw, False
    return {**raw, "plan": written}, True


def every_key_auto() -> dict[str, str]:
    """``plan = "auto"`` as a section, so that a value can be written over it."""
    return {key: AUTO for key in keys_of(PlanSpec) if key not in OWN_MEANING}

"""Pins as they are written (``pp=8 tp=4``), and why some can't be.

What is wrong with a pin alone is said before any search: what the machines can't give (``pp=3`` of 8 devices), and all
that ``spec.check`` refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from stretto.planner.candidates import divisors, fewest_seats, worlds
from stretto.planner.request import DEGREES, Request
from stretto.spec import capabilities
from stretto.spec.check import check
from stretto.spec.errors import ConfigError, UnsupportedError, nearest
from stretto.spec.fields import accept, keys_of
from stretto.spec.front import FILL, fills
from stretto.spec.overrides import value_of
from stretto.spec.plan import PlanSpec
from stretto.spec.states import SHARD_KEYS, StateSharding
from stretto.spec.written import read_named


def read_pins(words: Iterable[str], place: str = "--pin") -> dict[str, Any]:
    """Keys of the plan and their values, from ``pp=8,tp=4`` or one word each; ``auto`` pins nothing.

    >>> read_pins(["pp=8,tp=4", "schedule=zb-h1"])
    {'pp': 8, 'tp': 4, 'schedule': 'zb-h1'}
    """
    found: dict[str, Any] = {}
    for word in _split(words):
        name, equals, text = word.partition("=")
        name = name.strip().removeprefix("plan.")
        if not equals:
            raise ConfigError(f"{place} {word}: write KEY=VALUE, for example {place} pp=8.")
        if name in found:
            raise ConfigError(f"{place}: {name} is pinned twice.")
        found[name] = value_of(text.strip())
    return accept_pins(found, place)


def accept_pins(pins: Mapping[str, Any], place: str = "pins") -> dict[str, Any]:
    """Pins with values of the plan's types, without those that are ``auto``; ConfigError for others, or no such key."""
    accepted, known = {}, keys_of(PlanSpec)
    for name, value in pins.items():
        if name not in known:
            raise ConfigError(
                f"{place}: unknown key plan.{name}{nearest(name, known) or '; keys: ' + ', '.join(known)}"
            )
        if value != "auto":
            accepted[name] = accept(value, known[name], key=f"plan.{name}", place=place)
    return accepted


def check_pins(request: Request) -> None:
    """ConfigError or UnsupportedError where no plan can have these pins together, or the machines can't be."""
    pins, devices = dict(request.pins), request.devices
    if request.model.video is not None:
        pins.setdefault("context", capabilities.SWITCH)
    if fills(_plain_plan(pins)):
        raise UnsupportedError(
            f"The search doesn't lay out layers behind a frozen front, which the pass {FILL} computes ahead; plan "
            "without it, and add it to plan.passes of what is found (plan.stages then has the layers behind the front "
            "only)."
        )
    if pins.get("options") and not any(key in pins for key in ("schedule", "schedule_file")):
        raise ConfigError(
            "plan.options is read by one family of schedules; say which by plan.schedule, or leave it out."
        )
    # How cp ranks sit is checked with them, below.
    one: dict[str, Any] = dict.fromkeys((*DEGREES, "ulysses", "inner_ring"), 1)
    if pins.get("context_tokens", 0) >= 1:  # on one rank a document needs more room than on those of the plan
        one["context_tokens"] = max(pins["context_tokens"], request.run.training.sequence_length)
    alone = _plain_plan({key: value for key, value in pins.items() if key != "stages"})
    check(replace(request.run, plan=replace(alone, **one)), data=False)
    for axis in DEGREES:
        degree = pins.get(axis, 1)
        if degree < 1:
            raise ConfigError(f"plan.{axis} = {degree} must be at least 1.")
        if devices % degree:
            may = [str(choice) for choice in divisors(devices) if axis != "pp" or choice <= request.model.num_layers]
            raise ConfigError(f"plan.{axis} = {degree} can't divide {devices} devices; {axis} may be {', '.join(may)}.")
    product = prod(pins.get(axis, 1) for axis in DEGREES)
    written = " x ".join(f"{axis} {pins[axis]}" for axis in DEGREES if pins.get(axis, 1) > 1)
    if devices % product:
        raise ConfigError(
            f"{written} = {product} ranks can't divide {devices} devices; their product may be "
            f"{', '.join(map(str, divisors(devices)))}."
        )
    if all(axis in pins for axis in DEGREES) and product not in worlds(request):
        raise ConfigError(
            f"{written or 'every degree 1'} = {product} ranks leave {devices - product} of {devices} devices without "
            f"work; leave a degree open, for example dp_shard, or take {product} devices."
        )
    _check_states(pins, devices)
    seats = fewest_seats(pins)
    if "cp" not in pins and devices % seats:
        told = " and ".join(f"plan.{key} = {pins[key]}" for key in ("ulysses", "inner_ring") if key in pins)
        raise ConfigError(f"With {told} cp must be a multiple of {seats}, which can't divide {devices} devices.")
    check(replace(request.run, plan=_plain_plan(pins, devices)), data=False)
    _check_order(pins)
    if "schedule_file" in pins:
        _check_file(request, pins)


def _check_order(pins: dict[str, Any]) -> None:
    """ScheduleError for passes, and options of families and passes, that there aren't."""
    from stretto.schedule.families import FAMILIES, build
    from stretto.schedule.passes import PASSES, change

    for text in pins.get("passes", ()):
        name, settings = read_named(text, "plan.passes")
        if name not in PASSES or not settings.keys() <= set(PASSES[name].options):
            change(build("1f1b", ranks=1, microbatches=1), name, options=settings)
    family, options = pins.get("schedule"), pins.get("options", {})
    if family is not None and not options.keys() <= set(FAMILIES[family].options):
        build(family, ranks=2, microbatches=2, options=options)


def _check_file(request: Request, pins: dict[str, Any]) -> None:
    """ConfigError where a schedule file isn't for the devices or the batch; ScheduleError where it can't be read."""
    from stretto.schedule.document import load

    path, batch = pins["schedule_file"], request.run.training.global_batch_size
    found = load(Path(path).expanduser())
    ranks, microbatches = found.num_ranks, found.num_microbatches
    told = f"plan.schedule_file = {path!r} is for"
    if pins.get("pp", ranks) != ranks:
        raise ConfigError(f"{told} {ranks} ranks, but plan.pp = {pins['pp']}; take pp = {ranks}, or another file.")
    if request.devices % ranks:
        raise ConfigError(f"{told} {ranks} ranks, which can't divide {request.devices} devices; take another file.")
    stages = len(pins.get("stages") or ()) or pins.get("chunks", found.num_stages // ranks) * ranks
    if stages != found.num_stages:
        raise ConfigError(
            f"{told} {found.num_stages} stages, but the plan has {stages}; write plan.stages, the layers of each of "
            f"{found.num_stages} stages, or take another file."
        )
    if batch % microbatches:
        raise ConfigError(
            f"{told} {microbatches} micro-batches, which can't divide training.global_batch_size = {batch}; "
            f"take a multiple of {microbatches}, or another file."
        )


def _check_states(pins: dict[str, Any], devices: int) -> None:
    """ConfigError where no data ranks that the pinned degrees leave can divide states so."""
    fixed = prod(pins.get(axis, 1) for axis in ("pp", "tp"))
    known = [axis for axis in ("dp_replicate", "dp_shard") if axis in pins]
    ranks = prod(pins.get(axis, 1) for axis in (*known, "cp")) if len(known) == 2 else devices // fixed
    for key in SHARD_KEYS:
        if key in pins and (pins[key] < 1 or ranks % pins[key]):
            raise ConfigError(
                f"plan.{key} = {pins[key]} can't divide {ranks} data ranks; it may be "
                f"{', '.join(map(str, divisors(ranks)))}."
            )
    parameters = pins.get("shard_parameters", 1)
    gradients = pins.get("shard_gradients", parameters)
    StateSharding(parameters=parameters, gradients=gradients, optimizer=pins.get("shard_optimizer", gradients))


def _plain_plan(pins: dict[str, Any], devices: int = 1) -> PlanSpec:
    """The pins with what they need besides: a schedule that can have the chunks, ranks and chunks for the stages."""
    given = {key: value for key, value in pins.items() if key not in SHARD_KEYS}  # checked for themselves
    if "stages" in given and "schedule_file" not in given:
        given |= _holders(given, devices)
    chunks = given.get("chunks", 1)
    if "schedule" not in given:
        fitting = [name for name, counts in capabilities.SCHEDULES.items() if chunks in counts]
        if fitting and chunks > 1 and "schedule_file" not in given:
            given["schedule"] = fitting[0]
    elif "chunks" not in given and given["schedule"] in capabilities.SCHEDULES:
        given["chunks"] = capabilities.SCHEDULES[given["schedule"]][0]
    if given.get("schedule") == "hanayo" and "chunks" not in pins:
        waves = given.get("options", {}).get("waves")
        given["chunks"] = 2 * waves if type(waves) is int and waves > 0 else given["chunks"]
    given.setdefault("cp", fewest_seats(pins))
    return PlanSpec(**given)


def _holders(given: dict[str, Any], devices: int) -> dict[str, int]:
    """Ranks and chunks that can hold the stages, as many ranks as there can be; where none can, one rank a stage."""
    count = len(given["stages"])
    counts = capabilities.SCHEDULES.get(given.get("schedule", ""), capabilities.ANY)
    each = [given["pp"]] if "pp" in given else [pp for pp in reversed(divisors(count)) if devices % pp == 0]
    for pp in each:
        for chunks in [given["chunks"]] if "chunks" in given else counts:
            if pp * chunks == count:
                return {"pp": pp, "chunks": chunks}
    return {"pp": given.get("pp", max(1, count // given.get("chunks", counts[0])))}


def _split(words: Iterable[str]) -> list[str]:
    """Words at their commas, but for those inside brackets: ``stages=[3,5],pp=2``."""
    found: list[str] = []
    for word in words:
        depth, start = 0, 0
        for at, letter in enumerate(word):
            depth += (letter in "[{") - (letter in "]}")
            if letter == "," and depth == 0:
                found.append(word[start:at])
                start = at + 1
        found.append(word[start:])
    return [word for word in found if word.strip()]

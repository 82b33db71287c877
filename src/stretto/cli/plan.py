"""``stretto plan``: the fastest plans that fit, and why."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.spec.capabilities import EMBEDDED_CLIPS, EMBEDDED_CORPUS
from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    from stretto.planner.document_mix import Mix
    from stretto.planner.document_proposal import Proposal, Steps
    from stretto.planner.plan import Answer
    from stretto.planner.request import Request

SUMMARY = "find the fastest plan that fits, and say why"
DESCRIPTION = """\
Rank the plans of a model on a cluster: step time, tokens/s, MFU, peak memory, bubble, and why each beats the next.
Give a model and machines, or a run file: what its [plan] writes stays, all else is filled in. Only what this version
can run is proposed. --out writes a run file that stretto train runs unchanged."""
EXAMPLES = (
    "stretto plan --model llama-3-70b --cluster h100:512 --seq-len 8192 --global-batch 1024",
    "stretto plan --model llama-3-8b --cluster a100:16 --seq-len 4096 --global-batch 256 --pin pp=2 --out run.toml",
    "stretto plan --model llama-3-70b --cluster h100:512 --seq-len 8192 --global-batch 1024 --why-not tp=8,pp=2",
    "stretto plan --model llama-3-8b --cluster h100:64 --seq-len 8192 --global-batch 512 --objective cost --price 2.5",
    "stretto plan examples/demo.toml --json",
    "stretto plan --model llama-3-8b --cluster a100:16 --seq-len 4096 --global-batch 256 --html plan.html",
)
Price = tuple[float | None, str]
"""Of a device for an hour, and where it is from."""
UNKNOWN: Price = (None, "")
"""No price is said."""
OWN = "data"
"""Lengths of the run's own documents; so where its plan has groups and its tokens are at hand."""
NEEDED = ("model", "cluster", "seq_len", "global_batch")
"""Options that stand for a run file."""
SAME = {
    "model": ("model.name", "model.path"),
    "cluster": ("cluster.name",),
    "seq_len": ("training.sequence_length",),
    "global_batch": ("training.global_batch_size",),
    "dtype": ("training.dtype",),
    "calibration": ("cluster.calibration",),
}
"""Options, and the keys of --set that say the same."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what plan takes."""
    parser.add_argument("run_file", metavar="RUN_FILE", type=Path, nargs="?", help="run file whose plan to fill in")
    asked = parser.add_argument_group("what to plan, without a run file")
    asked.add_argument("--model", metavar="NAME|DIR", help="preset, or Hugging Face directory")
    asked.add_argument("--cluster", metavar="NAME:N|FILE", help="preset and number of devices, or a cluster file")
    asked.add_argument("--seq-len", type=int, metavar="T", help="tokens of a sequence (those of a clip)")
    asked.add_argument("--global-batch", type=int, metavar="B", help="sequences of a step")
    asked.add_argument("--dtype", help="bfloat16 (float32 on a CPU), float32 or float64")
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="write over keys of the run",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument(
        "--pin", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="keep a value of the plan"
    )
    how.add_argument("--objective", default="time", help="time (the default), cost or memory")
    how.add_argument("--price", type=float, metavar="X", help="price of a device for an hour")
    how.add_argument("--top", type=int, default=5, metavar="N", help="plans to list (5)")
    how.add_argument(
        "--thorough", action="store_true",
        help="simulate more schedules, and search for some; one or two minutes instead of seconds",
    )  # fmt: skip
    how.add_argument(
        "--critical-batch", type=int, metavar="TOKENS", help="largest useful batch, in tokens; warn beyond"
    )
    how.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what stretto diagnose --calibrate measured of the machine"
    )
    how.add_argument(
        "--lengths", metavar="MIX|FILE|data",
        help="lengths of the documents, as lognormal:median=2048,sigma=1.4,min=64,max=65536, a file of numbers, or the "
        "run's own data: says what groups of ranks for each document (plan.context_groups) would gain",
    )  # fmt: skip
    result = parser.add_argument_group("what to say")
    result.add_argument(
        "--why-not", metavar="KEY=VALUE,...", help="explain why the best plan isn't one with these values"
    )
    result.add_argument("--out", type=Path, metavar="FILE", help="write the run file of the best plan")
    result.add_argument("--html", type=Path, metavar="FILE", help="write a page of the plans for a browser")
    result.add_argument("--json", action="store_true", help="print the figures as JSON alone")


def execute(options: argparse.Namespace) -> int:
    """Plan, print, and write the run file."""
    _check_outputs(options)
    request = _request(options)
    documents = _lengths(options, request)
    said = _critical_batch(request, options)
    from stretto.planner.document_proposal import as_data as data_of
    from stretto.planner.document_proposal import described
    from stretto.planner.plan import answer
    from stretto.planner.report_data import as_data
    from stretto.planner.report_text import report

    if options.why_not is not None:
        _print_why_not(request, options)
        return 0
    with tempfile.TemporaryDirectory() as folder:  # of the schedules that are searched for
        found = answer(request, top=options.top, thorough=options.thorough, folder=Path(folder))
        mixed = _proposals(found, documents)
        wrote = _write(options, found, mixed)  # before anything is printed: whoever reads may leave early
        if options.json:
            more = {"critical_batch": said} if said else {}
            print(json.dumps(as_data(found) | more | ({"documents": data_of(mixed)} if mixed else {})))
            return 0
        told = ["", *described(mixed)] if mixed else []
        print("\n".join([report(found), *told, *([said] if said else []), *wrote]))
    return 0


def _lengths(options: argparse.Namespace, request: Request) -> Mix | Steps | None:
    """The lengths that are asked for, those of a run's own data, or none; before the search, which may take long."""
    asked: str | None = options.lengths
    if asked is not None and request.model.video is not None:
        raise ConfigError("--lengths: clips are all of one length; leave it out.")
    if asked is not None and asked != OWN:
        from stretto.planner.document_mix import mix_of

        return mix_of(asked)
    if asked is None and (options.run_file is None or request.pins.get("context_groups") != "dynamic"):
        return None
    if options.run_file is None:
        raise ConfigError(f"--lengths {OWN} are those of a run's own documents; name its run file.")
    from stretto.trainer.document_steps import lengths_at_hand

    found = lengths_at_hand(request.run)
    if found is None and asked is not None:
        raise ConfigError(
            f"--lengths {OWN}: the tokens of {options.run_file} aren't there yet; stretto train makes them, or give "
            "lengths as lognormal:median=2048,sigma=1.4,min=64,max=65536 or a file of numbers."
        )
    return found


def _proposals(found: Answer, documents: Mix | Steps | None) -> tuple[Proposal, ...]:
    """What documents of such lengths make of the plans; nothing, where none are given."""
    if documents is None:
        return ()
    from stretto.planner.document_proposal import propose

    return propose(found, documents)


def _write(options: argparse.Namespace, found: Answer, mixed: tuple[Proposal, ...]) -> list[str]:
    """Write what is asked for; what to say of it."""
    said = []
    run = found.run()
    if mixed:
        run = replace(found.run(mixed[0].number - 1), plan=mixed[0].plan)
    if options.out is not None:
        from stretto.spec import toml

        replaced = " (instead of an older file)" if options.out.exists() else ""
        if run.plan.schedule_file is not None and run.plan.schedule == "auto":
            beside = options.out.with_name(f"{options.out.stem}-schedule.json")
            older = " (instead of an older file)" if beside.exists() else ""
            shutil.copyfile(run.plan.schedule_file, beside)
            run = replace(run, plan=replace(run.plan, schedule_file=str(beside)))
            said.append(f"\nwrote {beside}{older}: the schedule that was searched for")
        toml.save(run, options.out)
        said.append(f"\nwrote {options.out}{replaced}: stretto train {options.out}")
    elif run.plan.schedule_file is not None and run.plan.schedule == "auto":
        said.append("\nthe schedule was searched for; --out writes it beside the run file")
    if options.html is not None:
        from stretto.planner.report_page import page

        options.html.write_text(page(found, options.command), encoding="utf-8")
        said.append(f"\nwrote {options.html}")
    return said


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise ConfigError for what would be passed over, or a file that can't be written, before any work is done."""
    if options.why_not is not None:
        for name in ("out", "html", "thorough", "critical_batch", "lengths"):
            if getattr(options, name):
                raise ConfigError(f"--why-not explains one plan and does nothing else; leave out --{_flag(name)}.")
    for name in ("out", "html"):
        path = getattr(options, name)
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"--{name} {path} can't be written; name a file in a folder that exists.")
    if options.out is not None and options.html is not None and options.out.resolve() == options.html.resolve():
        raise ConfigError(f"--out and --html both name {options.out}; name two files.")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _critical_batch(request: Request, options: argparse.Namespace) -> str | None:
    """What the batch is against the critical one, where that is asked."""
    if options.critical_batch is None:
        return None
    from stretto.planner.critical_batch import verdict

    training = request.run.training
    return verdict(training.global_batch_size * training.sequence_length, options.critical_batch)


def _print_why_not(request: Request, options: argparse.Namespace) -> None:
    from stretto.planner.explain import why_not
    from stretto.planner.pins import read_pins

    pins = read_pins([options.why_not], "--why-not")
    if not pins:
        raise ConfigError("--why-not names no value; write KEY=VALUE,..., for example --why-not tp=8,pp=2.")
    why = why_not(request, pins)
    print(json.dumps({"why_not": why}) if options.json else why)


def _request(options: argparse.Namespace) -> Request:
    from stretto.planner.pins import read_pins
    from stretto.planner.request import Request

    pinned = read_pins(options.pin)
    _check_once(options, pinned)
    run, pins, (price, source) = _of_file(options) if options.run_file is not None else _of_options(options)
    pins = {**pins, **pinned}
    if options.calibration is not None:
        run = replace(run, cluster=replace(run.cluster, calibration=str(options.calibration)))
    if options.price is not None:
        price, source = options.price, "--price"
    return Request(run=run, pins=pins, objective=options.objective, price=price, price_source=source)


def _check_once(options: argparse.Namespace, pinned: dict[str, Any]) -> None:
    """Raise ConfigError for what --set and another option both say, of which one would be passed over."""
    written = {word.partition("=")[0].strip() for word in options.overrides}
    said = {f"--{_flag(name)}": keys for name, keys in SAME.items() if getattr(options, name) is not None}
    said |= {f"--pin {key}": (f"plan.{key}",) for key in pinned}
    for flag, keys in said.items():
        for key in keys:
            if key in written:
                raise ConfigError(f"{flag} and --set {key} say the same thing; leave one of them out.")


def _of_file(options: argparse.Namespace) -> tuple[Any, dict[str, Any], Price]:
    from stretto.spec import toml
    from stretto.spec.resolve import resolve_open

    run, pins, _ = resolve_open(toml.read(options.run_file), str(options.run_file), options.overrides)
    training, price = run.training, UNKNOWN
    if options.model is not None:
        run = replace(run, model=_model(options.model, options.overrides))
    if options.cluster is not None:
        cluster, price = _cluster(options.cluster, options.overrides)
        run = replace(run, cluster=cluster)
    if options.dtype is not None:
        training = replace(training, dtype=options.dtype)
    if options.seq_len is not None:
        training = replace(training, sequence_length=options.seq_len)
    if options.global_batch is not None:
        training = replace(training, global_batch_size=options.global_batch)
    return replace(run, training=training), pins, price


def _of_options(options: argparse.Namespace) -> tuple[Any, dict[str, Any], Price]:
    from stretto.spec.resolve import resolve_open

    model: Any = None if options.model is None else _model(options.model, options.overrides)
    clip = None if model is None else model.video
    length = clip.tokens if clip is not None and options.seq_len is None else options.seq_len
    given = {**vars(options), "seq_len": length}
    missing = [f"--{_flag(name)}" for name in NEEDED if given[name] is None]
    if missing:
        raise ConfigError(f"Without a run file plan also needs {', '.join(missing)}.")
    run, pins, _ = resolve_open("", "--set", options.overrides)
    cluster, price = _cluster(options.cluster, options.overrides)
    cpu = cluster.name.partition(":")[0] == "local-cpu"
    dtype: Any = ("float32" if cpu else "bfloat16") if options.dtype is None else options.dtype
    if any(word.partition("=")[0].strip() == "training.dtype" for word in options.overrides):
        dtype = run.training.dtype
    training = replace(run.training, sequence_length=length, global_batch_size=options.global_batch, dtype=dtype)
    drawn = EMBEDDED_CORPUS if clip is None else EMBEDDED_CLIPS
    data = run.data if run.data.path or run.data.sources else replace(run.data, path=drawn)
    return replace(run, model=model, cluster=cluster, training=training, data=data), pins, price


def _model(name: str, overrides: list[str]) -> Any:
    """A preset or a directory, and what --set writes over it."""
    from stretto.spec.presets_model import MODELS

    directory = name not in MODELS and (os.sep in name or (name != "" and Path(name).is_dir()))
    return _section("model", "path" if directory else "name", name, overrides).model


def _cluster(name: str, overrides: list[str]) -> tuple[Any, Price]:
    """A preset with what --set writes over it, or a file and its price."""
    if not name.endswith(".toml"):
        if os.sep in name or Path(name).is_file():
            raise ConfigError(f"--cluster {name}: a cluster file ends in .toml; presets are named as a100:8.")
        return _section("cluster", "name", name, overrides).cluster, UNKNOWN
    from stretto.planner.cluster_file import read_cluster

    if not Path(name).is_file():
        fact = "is a folder" if Path(name).is_dir() else "doesn't exist"
        raise ConfigError(f"The cluster file {name} {fact}; write one, or name a preset and a number, as a100:8.")
    written = [word for word in overrides if word.startswith("cluster.")]
    if written:
        raise ConfigError(f"--set {written[0]} says what the cluster file {name} should; write it there.")
    found = read_cluster(Path(name))
    return found.cluster, (found.price, found.source)


def _section(section: str, key: str, value: str, overrides: list[str]) -> Any:
    """A run of which one section is a preset with its own overrides."""
    from stretto.spec.resolve import resolve_open

    own = [word for word in overrides if word.startswith(f"{section}.")]
    return resolve_open("", f"--{section}", [f"{section}.{key}={json.dumps(value)}", *own])[0]

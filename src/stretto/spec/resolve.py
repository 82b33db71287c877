"""From a user's run file to a resolved run.

    run.toml ──► parsed ──► overridden ──► checked keys ──┐
                                                          ├──► RunSpec
    preset, or config.json of a Hugging Face directory ───┘

What the user wrote lies on top of what a preset or a directory says, key by key.  A section that writes
every key out, as the resolved ``run.toml`` of a run's directory does, needs nothing beneath it and
is taken as it is, so a finished run can be read when its directory has moved.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stretto.spec import toml
from stretto.spec.automatic import Planner, split_auto
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.fields import Given, build, keys_of, strip_none
from stretto.spec.model import ModelSpec
from stretto.spec.overrides import apply_overrides
from stretto.spec.presets_cluster import CLUSTERS, cluster_preset
from stretto.spec.presets_model import MODELS, model_preset
from stretto.spec.run import RunSpec

SIZES = ("hidden_size", "num_layers", "num_heads", "vocab_size")
"""Keys that a model without preset and directory must write."""


def load_run(path: str | Path, overrides: Iterable[str] = (), *, planner: Planner | None = None) -> RunSpec:
    """Read the run file ``path``, write ``overrides`` over it, fill in presets, and have ``planner`` fill in ``auto``.

    Raises ConfigError for a file that is missing or not TOML, an unknown key, a value of the wrong
    type, an unknown preset; UnsupportedError for ``auto`` where there is no planner.  Whether
    the run can work is ``check``'s to say.
    """
    return resolve_text(toml.read(path), str(path), overrides, planner=planner)


def resolve_text(
    text: str, place: str = "run.toml", overrides: Iterable[str] = (), *, planner: Planner | None = None
) -> RunSpec:
    """Like load_run, of TOML text; ``place`` names it in errors."""
    run, pins, automatic = resolve_open(text, place, overrides)
    if not automatic:
        return run
    if planner is None:
        raise UnsupportedError(
            f'{place}: "auto" in the plan needs the planner; take the run through stretto plan, stretto train or '
            "stretto.load_run, which have one, or write the values."
        )
    return dataclasses.replace(run, plan=planner(run, pins))


def resolve_open(
    text: str, place: str = "run.toml", overrides: Iterable[str] = ()
) -> tuple[RunSpec, dict[str, Any], bool]:
    """The run with whatever of its plan is written, those values, and whether ``auto`` asks for more."""
    raw, automatic = split_auto(apply_overrides(toml.parse(text, place), overrides))
    given = toml.accept_file(raw, place)
    run = toml.build_run(given)
    try:
        model, cluster = _model(given), _cluster(given)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return dataclasses.replace(run, model=model, cluster=cluster), dict(given.get("plan", {})), automatic


def read_model(path: str | Path) -> ModelSpec:
    """The model that the config.json of a Hugging Face directory describes, ``path`` remembered."""
    folder = Path(path)
    config = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(f"The model directory {folder} doesn't exist; model.path is a folder with config.json in it.")
    if not config.is_file():
        raise ConfigError(f"{folder} has no config.json, so it is not a Hugging Face model directory.")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{config} must hold a JSON object.")
    from stretto.spec.hugging_face import model_from_config

    return dataclasses.replace(model_from_config(values), path=str(path))


def _model(given: Given) -> ModelSpec:
    written = given.get("model", {})
    name, path = written.get("name"), written.get("path")
    if _complete(ModelSpec, written):
        return build(ModelSpec, written)
    if path is not None:
        if name in MODELS:
            raise ConfigError(
                f"model.name is the preset {name!r} and model.path is {path!r}, and both say what the model is; "
                "leave one of them out."
            )
        return build(ModelSpec, {"name": Path(path).resolve().name, **written}, read_model(path))
    # Without a name the defaults lie beneath; with one, it must be a label for sizes that are all written.
    sizes = SIZES if written.get("family") != "video" else (*SIZES[:-1], "video")
    own_sizes = written.get("family") == "foreign" or all(key in written for key in sizes)
    if name is None or (own_sizes and name not in MODELS):
        return build(ModelSpec, written)
    try:
        return build(ModelSpec, written, model_preset(name))
    except ConfigError as error:
        missing = ", ".join(key for key in sizes if key not in written)
        raise ConfigError(f"{error} To describe a model of your own under that name, also write {missing}.") from error


def _cluster(given: Given) -> ClusterSpec:
    written = given.get("cluster", {})
    name = written.get("name")
    if name is None or (name.partition(":")[0] not in CLUSTERS and "memory_bytes" in written):
        return build(ClusterSpec, written)
    return build(ClusterSpec, written, cluster_preset(name))


def _complete(cls: type, written: Mapping[str, Any]) -> bool:
    return all(key in written or strip_none(annotation)[1] for key, annotation in keys_of(cls).items())

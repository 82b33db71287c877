"""Finds the function that ``model.module`` names and takes its model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from stretto.models.foreign.hugging_face import from_hugging_face, is_hugging_face
from stretto.spec.contract import Stack
from stretto.spec.errors import ConfigError, UnsupportedError, nearest

if TYPE_CHECKING:
    from stretto.spec.model import ModelSpec

FORMS = "model.module may be package.module:function or file.py:function"


def load_foreign(spec: ModelSpec) -> Stack:
    """Return the Stack that ``spec.module`` builds.

    The function is called with ``spec`` if it takes an argument.  It returns a Stack, or a Hugging
    Face causal language model, which is wrapped.  Raises ConfigError where the function isn't found
    or the model has another number of layers than ``spec.num_layers``.
    """
    name = spec.module or ""
    place, _, function_name = name.rpartition(":")
    if not place or not function_name:
        raise ConfigError(f"model.module = {spec.module!r} names no function; {FORMS}.")
    module = import_file(Path(place)) if place.endswith(".py") else import_package(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{place} has no function {function_name!r}{nearest(function_name, known)}.")
    model = as_stack(function(spec) if takes_argument(function) else function(), name)
    if len(model.blocks) != spec.num_layers:
        raise ConfigError(
            f"{name} built {len(model.blocks)} layers, but model.num_layers is {spec.num_layers}; make them equal."
        )
    return model


def as_stack(model: Any, name: str) -> Stack:
    """Return ``model`` as a Stack."""
    if isinstance(model, nn.Module) and isinstance(model, Stack):
        return model
    if isinstance(model, nn.Module) and is_hugging_face(model):
        return cast("Stack", from_hugging_face(model))
    raise UnsupportedError(
        f"{name} returned a {type(model).__name__}, which is neither a Stack (inputs, blocks, outputs, ...; "
        f"see ForeignStack) nor a Hugging Face causal language model."
    )


def import_file(path: Path) -> ModuleType:
    """Import a Python file, relative to the working directory."""
    if not path.is_file():
        raise ConfigError(f"model.module names {path}, which isn't a file; {FORMS}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a module up by name while it is being executed.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def import_package(place: str) -> ModuleType:
    """Import a module by its dotted name."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.module names {place}, which can't be imported ({error}); {FORMS}.") from None


def takes_argument(function: Any) -> bool:
    """Return whether ``function`` wants an argument (the ModelSpec)."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty for p in inspect.signature(function).parameters.values())

"""A run survives being written and read; what doesn't belong in a run file is named."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.spec import toml
from stretto.spec.automatic import OWN_MEANING
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec, SourceSpec
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.fields import is_open_table, is_table, keys_of, sections, strip_none
from stretto.spec.model import ModelSpec, RopeScaling
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


def values(annotation: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Any value that a field of this annotation may hold."""
    annotation, optional = strip_none(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        found: st.SearchStrategy[typing.Any] = st.sampled_from(typing.get_args(annotation))
    elif typing.get_origin(annotation) is tuple:
        found = st.lists(values(typing.get_args(annotation)[0]), max_size=3).map(tuple)
    elif is_open_table(annotation):
        scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT
        found = st.dictionaries(TEXT, scalars | st.lists(scalars, max_size=2).map(tuple), max_size=3)
    elif is_table(annotation):
        found = specs(annotation)
    else:
        floats = st.floats(allow_nan=False, allow_infinity=False)
        # "auto" is refused in a plan on purpose, see below.
        text = TEXT.filter(lambda word: word != "auto")
        found = {int: st.integers(-(2**63), 2**63 - 1), float: floats, bool: st.booleans(), str: text}[annotation]
    return st.none() | found if optional else found


def specs(cls: type) -> st.SearchStrategy[typing.Any]:
    """Any instance of a dataclass of the run."""
    return st.builds(cls, **{name: values(annotation) for name, annotation in keys_of(cls).items()})


@settings(max_examples=60, deadline=None)
@given(specs(RunSpec))
def test_any_run_round_trips(run: RunSpec) -> None:
    again = toml.from_text(toml.to_text(run))
    assert again == run
    assert repr(again) == repr(run)  # 1 == 1.0 == True would pass the line above


def test_round_trip_keeps_lists_and_tables() -> None:
    run = RunSpec(
        run=RunSettings(dir='a "quoted" dir', seed=7),
        model=ModelSpec(rope_scaling=RopeScaling(factor=32.0), sliding_window=16, norm_eps=1e-6),
        plan=PlanSpec(pp=2, stages=(3, 5), zero=3),
        data=DataSpec(sources=(SourceSpec(path="a", weight=0.25), SourceSpec(path="b")), suffixes=(".py", ".md")),
    )
    text = toml.to_text(run)
    assert "None" not in text
    assert toml.from_text(text) == run


def test_absent_keys_are_defaults() -> None:
    assert toml.from_text("") == RunSpec()
    assert toml.from_text("[plan]\npp = 2").plan == PlanSpec(pp=2)


def test_whole_numbers_pass_for_numbers() -> None:
    rate = toml.from_text("[training]\nlearning_rate = 1").training.learning_rate
    assert rate == 1.0 and isinstance(rate, float)


def test_save_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = toml.save(RunSpec(cluster=ClusterSpec(name="h100:16")), tmp_path / "deep" / "run.toml")
    assert toml.from_text(toml.read(path)).cluster.name == "h100:16"
    assert [p.name for p in path.parent.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plan]\nppp = 2", "r.toml: unknown key plan.ppp; did you mean 'plan.pp'?"),
        ("[training]\nstepz = 2", "r.toml: unknown key training.stepz; did you mean 'training.steps'?"),
        ("[training]\npp = 2", "r.toml: unknown key training.pp; did you mean 'plan.pp'?"),
        ("[plan]\nxyzzy = 2", "r.toml: unknown key plan.xyzzy; [plan] has pp, tp, cp, "),
        ("[trainig]\nsteps = 2", "r.toml: there is no section [trainig]; did you mean 'training'?"),
        ("steps = 2", "r.toml: there is no section [steps]; did you mean 'training.steps'?"),
        ("plan = 3", "r.toml: plan must be a section, not 3"),
        ("[model.rope_scaling]\nfactr = 2", "r.toml: unknown key model.rope_scaling.factr; did you mean 'factor'?"),
        ("[plan]\npp = '2'", "r.toml: plan.pp must be a whole number, not '2'"),
        ("[plan]\npp = 2.0", "r.toml: plan.pp must be a whole number, not 2.0"),
        ("[plan]\npp = true", "r.toml: plan.pp must be a whole number, not True"),
        ("[plan]\noffload = 1", "r.toml: plan.offload must be true or false, not 1"),
        ("[plan]\nstages = 3", "r.toml: plan.stages must be a list of whole numbers, not 3"),
        ("[plan]\nstages = [1, 'x']", "r.toml: plan.stages[1] must be a whole number, not 'x'"),
        ("[plan]\nzero = 4", "r.toml: plan.zero = 4 is none of 1, 2, 3."),
        ("[plan]\nzero = true", "r.toml: plan.zero = true is none of 1, 2, 3."),
        ("[training]\nlearning_rate = 'x'", "r.toml: training.learning_rate must be a number, not 'x'"),
        ("[training]\nlearning_rate = 'auto'", "r.toml: training.learning_rate must be a number, not 'auto'"),
        ("[training]\ndtype = 'bfloat'", '"float32", "bfloat16"; did you mean \'bfloat16\'?'),
        ("[model]\nname = 3", "r.toml: model.name must be a string, not 3"),
        ("[model]\nrope_scaling = 3", "r.toml: model.rope_scaling must be a table with factor, "),
        ("[data]\nsuffixes = '.py'", "r.toml: data.suffixes must be a list of strings, not '.py'"),
        ("[[data.sources]]\nweight = 1", "r.toml: data.sources[0] lacks path."),
        ("[[data.sources]]\npath = 'a'\nwheight = 1", "r.toml: unknown key data.sources[0].wheight; did you mean"),
        ("[data]\nsources = 'a'", "r.toml: data.sources must be a list of tables with path, weight, not 'a'"),
        ("[plan\npp = 2", "r.toml is not valid TOML: Expected"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        toml.from_text(text, "r.toml")
    assert message in str(error.value)


@pytest.mark.parametrize("key", [key for key in keys_of(PlanSpec) if key not in OWN_MEANING])
def test_auto_in_the_plan_needs_the_planner(key: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"plan\.{key} = \"auto\" needs the planner.* for example plan\.{key} = "
    ):
        toml.from_text(f"[plan]\n{key} = 'auto'")


def test_auto_where_it_means_something() -> None:
    with pytest.raises(UnsupportedError, match=r"write a \[plan\] section"):
        toml.from_text("plan = 'auto'")
    assert toml.from_text("[plan]\nstages = 'auto'").plan.stages is None
    run = toml.from_text("[run]\ndevice = 'auto'\n[data]\nformat = 'auto'\n[checkpoint]\nresume = 'auto'")
    assert run == RunSpec()


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"rum\.toml doesn't exist; did you mean 'run\.toml'"):
        toml.read(tmp_path / "rum.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        toml.read(tmp_path)
    with pytest.raises(ConfigError, match="UTF-8"):
        toml.read(tmp_path / "binary.toml")


def test_every_key_has_a_docstring() -> None:
    """The line under each field is the reference of run files."""
    import ast
    import inspect

    for cls in [*sections().values(), RunSpec, RopeScaling, SourceSpec]:
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.__name__}.{ast.unparse(field.target)}"
    assert {f.name for f in dataclasses.fields(TrainingSpec)} == set(keys_of(TrainingSpec))

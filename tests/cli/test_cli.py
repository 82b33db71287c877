"""The command line: what it passes on, what it prints, how it ends.

The rooms that do the work are replaced by stand-ins here, so that only the command line is tested;
help and bad input are also run as a user runs them, in a process of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import stretto
from stretto.cli.main import VERBS, main
from stretto.spec.errors import CheckpointError, RankError
from stretto.spec.run import RunSpec

TINY = "[model]\nname = 'tiny'\n[data]\npath = 'stdlib'\n"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run file that passes every check."""
    path = tmp_path / "run.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace ``module`` by one with the given functions."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def replace(module: str, **functions: Any) -> None:
        stub = ModuleType(module)
        stub.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module, stub)

    return replace


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run([sys.executable, "-m", "stretto.cli.main", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("verb", [[], *([module.__name__.rpartition(".")[2]] for module in VERBS)])
def test_help_has_an_example_and_is_quick(verb: list[str]) -> None:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        result = in_process(*verb, "--help")
        took.append(time.perf_counter() - start)
        assert result.returncode == 0
    assert "example" in result.stdout and "\n  stretto " in result.stdout
    assert min(took) < 0.5  # 0.06 s on a quiet machine; the limit that matters is that torch (5 s) isn't loaded


def test_examples_of_help_can_be_parsed() -> None:
    """An example that the parser refuses would be worse than none."""
    import shlex

    from stretto.cli.main import parser

    for module in VERBS:
        for example in module.EXAMPLES:
            words = shlex.split(example)
            arguments = words[words.index("stretto") + 1 :] if "stretto" in words else words[words.index("train") :]
            assert parser().parse_args(arguments).execute is module.execute


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "The run file none.toml doesn't exist"),
        (["train", "{run}", "--set", "plan.tp=3"], "8 heads can't be split over tp=3; tp may be 1, 2 or 4."),
        (["train", "{run}", "--set", "plan.pq=3"], "--set: unknown key plan.pq"),
        (["train", "{run}", "--set", "plan.pp=auto", "plan.tp=3"], "8 heads can't be split over tp=3"),
        (["verify", "{run}", "--set", "plan.stages=[1,2]"], "plan.stages = [1, 2] names 2 stages"),
        (["simulate", "--schedule", "1f1b"], "--schedule 1f1b also needs --pp and --microbatches."),
        (["simulate", "--schedule", "2f2b", "--pp", "2", "--microbatches", "2"], "There is no schedule '2f2b'"),
        (["simulate", "--schedule-file", "none.json"], "The schedule file none.json can't be read"),
        (["generate", "x", "--max-tokens", "0"], "--max-tokens 0 must be at least 1."),
        (["generate", "x", "--temperature", "-1"], "--temperature -1.0 must be a finite number"),
        (["generate", "x", "--top-k", "0"], "--top-k 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, run_file: Path) -> None:
    result = in_process(*(argument.format(run=run_file) for argument in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("stretto: error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = in_process("train", "none.toml", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ConfigError" in result.stderr


def test_unknown_verb() -> None:
    result = in_process("trian")
    assert result.returncode == 2
    assert "train" in result.stderr


def test_train_passes_the_resolved_run(stand_in: Any, run_file: Path) -> None:
    seen: dict[str, Any] = {}

    def run_training(run: RunSpec, *, run_file: Path | None) -> int:
        seen.update(run=run, file=run_file)
        return 0

    stand_in("stretto.trainer.launch", run_training=run_training)
    assert main(["train", str(run_file), "--set", "plan.pp=2", "plan.stages=[1,3]", "--set", "run.seed=5"]) == 0
    assert seen["file"] == run_file
    assert (seen["run"].plan.pp, seen["run"].plan.stages, seen["run"].run.seed) == (2, (1, 3), 5)
    assert seen["run"].model.num_kv_heads == 4  # of the preset


def test_train_returns_the_code_of_the_run(stand_in: Any, run_file: Path) -> None:
    stand_in("stretto.trainer.launch", run_training=lambda run, *, run_file: 1)
    assert main(["train", str(run_file)]) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(RankError("rank 3 is silent"), 1), (CheckpointError("damaged"), 2), (OSError("disk full"), 1)],
)
def test_errors_of_the_run(
    stand_in: Any, run_file: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(run: RunSpec, *, run_file: Path | None) -> int:
        raise error

    stand_in("stretto.trainer.launch", run_training=fail)
    assert main(["train", str(run_file)]) == code
    assert capsys.readouterr().err == f"stretto: error: {error}\n"
    with pytest.raises(type(error)):
        main(["train", str(run_file), "--debug"])


@pytest.mark.parametrize("equal", [True, False])
def test_verify(stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], equal: bool) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nname = 'tiny'")  # no corpus: verify reads none
    report = SimpleNamespace(equal=equal, loss_error=1e-16, grad_error=0.25, worst_parameter="blocks.0.a", other=1)
    stand_in("stretto.trainer.verify", verify=lambda run: report)
    assert main(["verify", str(path), "--json"]) == (0 if equal else 1)
    expected = {"equal": equal, "loss_error": 1e-16, "grad_error": 0.25, "worst_parameter": "blocks.0.a"}
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["verify", str(path)]) == (0 if equal else 1)
    text = capsys.readouterr().out
    assert ("NOT equal" in text) is not equal and "blocks.0.a" in text


def test_generate_streams(stand_in: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seen = {}

    def generate_text(source: str, prompt: str, *, max_tokens: int, sampling: dict[str, Any]) -> Iterator[str]:
        seen.update(source=source, prompt=prompt, max_tokens=max_tokens, **sampling)
        yield from ("f(", "x)")

    (tmp_path / "config.json").write_text("{}")
    source = str(tmp_path)
    stand_in("stretto.inference", generate_text=generate_text, Sampling=dict, load_source=str)
    assert main(["generate", source, "--prompt", "def ", "--top-k", "5", "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == "def f(x)\n"
    sampling = {"temperature": 0.8, "top_k": 5, "seed": 0}
    assert seen == {"source": source, "prompt": "def ", "max_tokens": 9, **sampling}
    assert "".join(stretto.generate(source, seed=4)) == "f(x)"
    assert seen["seed"] == 4


def test_convert(stand_in: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seen = []

    def convert(source: str, target: str, *, dtype: str | None) -> Path:
        seen.append((source, target, dtype))
        return Path(target)

    stand_in("stretto.trainer.convert", convert=convert)
    assert main(["convert", "runs/a", "out", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "out\n"
    assert stretto.convert(tmp_path, "out") == Path("out")
    assert seen == [("runs/a", "out", "bfloat16"), (str(tmp_path), "out", None)]


def test_functions_take_a_run_or_a_file(stand_in: Any, run_file: Path) -> None:
    seen = []
    stand_in("stretto.trainer.launch", run_training=lambda run, *, run_file: seen.append((run, run_file)) or 0)
    assert stretto.train(run_file, ["run.dir=runs/x"]) == Path("runs/x")
    run = stretto.load_run(run_file)
    assert stretto.train(run) == Path(run.run.dir)
    assert [file for _, file in seen] == [run_file, None]
    with pytest.raises(stretto.ConfigError, match=r"dataclasses\.replace"):
        stretto.train(run, ["plan.pp=2"])
    with pytest.raises(stretto.ConfigError, match="no corpus"):
        stretto.train(RunSpec())
    stand_in("stretto.trainer.launch", run_training=lambda run, *, run_file: 3)
    with pytest.raises(stretto.RankError, match="exit code 3"):
        stretto.train(run)
    stand_in("stretto.trainer.launch", run_training=lambda run, *, run_file: 143)
    with pytest.raises(stretto.RankError, match="asked to stop"):
        stretto.train(run)


def test_simulate_prints_the_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """1F1B by hand: R = 2, M = 2, F = 1 and B = 2 make 9, of which each rank works 6."""
    shape = ["--pp", "2", "--microbatches", "2"]
    export = tmp_path / "s.json"
    assert main(["simulate", "--schedule", "1f1b", *shape, "--json", "--export", str(export)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.pop("bubble_rate") == pytest.approx(1 / 3)
    assert figures.pop("bubble_rate_span") == pytest.approx(1 / 3)
    assert figures.pop("lower_bound") <= 9
    assert figures == {
        "name": "1f1b",
        "ranks": 2,
        "stages": 2,
        "microbatches": 2,
        "makespan": 9,
        "span": 9,
        "busy": [6, 6],
        "peak_activation": [2, 1],
    }
    assert main(["simulate", "--schedule-file", str(export)]) == 0
    drawn = capsys.readouterr().out
    assert "rank 1 │   F0-B0----" in drawn and "makespan         9" in drawn
    assert main(["simulate", "--schedule-file", str(export), "--pp", "2"]) == 2
    assert "The schedule file says its own shape; leave out --pp." in capsys.readouterr().err


def test_simulate_checks_what_it_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    export = tmp_path / "s.json"
    main(["simulate", "--schedule", "1f1b", "--pp", "2", "--microbatches", "2", "--export", str(export), "--json"])
    document = json.loads(export.read_text())
    document["actions"][0].remove("0B1")
    export.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["simulate", "--schedule-file", str(export)]) == 2
    assert "stage 0, micro-batch 1 has no backward" in capsys.readouterr().err


def test_the_code_of_a_stopped_run_is_the_launchers() -> None:
    from stretto.cli import verbs
    from stretto.trainer import member

    assert verbs.STOPPED == member.STOPPED

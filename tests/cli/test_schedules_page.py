"""docs/schedules.md and README.md show what the commands print; the page names every family and pass."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

from stretto.cli.main import main
from stretto.schedule.document import save
from stretto.schedule.families import FAMILIES, build
from stretto.schedule.op import Op
from stretto.schedule.passes import PASSES
from stretto.schedule.schedule import Schedule

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "schedules.md"
BLOCK = re.compile(r"^```\n\$ stretto (simulate .*)\n((?:.*\n)*?)```$", flags=re.MULTILINE)
BLOCKS = [block for page in (PAGE, ROOT / "README.md") for block in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_commands_print_what_the_page_shows(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``...`` stands for anything."""
    monkeypatch.chdir(tmp_path)
    _deadlock()
    main(shlex.split(command))
    printed = capsys.readouterr()
    got = printed.out + printed.err
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(shown, got, flags), got


def test_blocks_are_found() -> None:
    assert len(BLOCKS) >= 7


def test_every_family_and_pass_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in (*FAMILIES, *PASSES) if f"`{name}`" not in text] == []


def test_the_picture_is_what_its_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"`stretto (simulate [^`]* --svg docs/zb-h1.svg)`", PAGE.read_text(encoding="utf-8"))
    drawn = tmp_path / "zb-h1.svg"
    assert main([*shlex.split(command)[:-1], str(drawn)]) == 0
    assert drawn.read_text() == (PAGE.parent / "zb-h1.svg").read_text()


def _deadlock() -> None:
    """The schedule file that the page shows an error for."""
    right = build("1f1b", ranks=2, microbatches=2)
    orders = [["0F0", "0B0", "0F1", "0B1"], ["1F1", "1B1", "1F0", "1B0"]]
    wrong = Schedule.from_orders(
        [[Op.parse(token) for token in order] for order in orders],
        name="deadlock",
        num_stages=2,
        num_microbatches=2,
        placement=right.placement,
    )
    save(wrong, "deadlock.json")

"""The house stands: a room imports only from lower floors (the table of the design), and rooms that
promise to be quick don't import torch.

The imports are read with ``ast``, those inside functions too, so that a lazy import can't hide an
arrow; only ``if TYPE_CHECKING:`` is exempt.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    "spec": 0,
    "schedule": 1,
    "planner": 2,
    "parallel": 2,
    "models": 2,
    "data": 2,
    "assemble": 3,
    "checkpoint": 3,
    "resilience": 3,
    "trainer": 4,
    "inference": 4,
    "cli": 5,
}
WITHOUT_TORCH = ("spec", "schedule", "planner", "cli")
PACKAGE = Path(__file__).parents[1] / "src" / "stretto"


def is_type_checking(node: ast.AST) -> bool:
    """Whether ``node`` is an ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, *, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """All import statements below ``node``; without ``lazy`` only those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield from imports(ast.Module([other], []), lazy=lazy)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, lazy=lazy)


def targets(statement: ast.Import | ast.ImportFrom, module: list[str]) -> list[str]:
    """Dotted names that a statement imports; ``module`` is the importing package, for relative imports."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    base = statement.module or ""
    if statement.level:
        stem = module[: len(module) - statement.level + 1]
        base = ".".join([*stem, base] if base else stem)
    return [f"{base}.{alias.name}" for alias in statement.names]


def forbidden(package: Path) -> list[str]:
    """What is wrong with the imports of the package, one line each."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        inside = file.relative_to(package).parts
        if len(inside) == 1:
            continue  # the package's own __init__ lies above all rooms
        room, where = inside[0], "/".join(inside)
        if room not in FLOORS:
            wrong.append(f"{where}: {room} has no floor")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for statement in imports(tree, lazy=True):
            for target in targets(statement, [package.name, *inside[:-1]]):
                wrong += [f"{where}:{statement.lineno}: {why}" for why in arrow(room, target.split("."), package.name)]
        if room in WITHOUT_TORCH:
            for statement in imports(tree, lazy=False):
                found = {target.split(".")[0] for target in targets(statement, [package.name, *inside[:-1]])}
                if "torch" in found:
                    wrong.append(f"{where}:{statement.lineno}: {room} imports torch when it is imported")
    return wrong


def arrow(room: str, target: list[str], package: str) -> Iterator[str]:
    """Why ``room`` may not import ``target``, if it may not."""
    if target[0] != package:
        return
    if len(target) == 1 or target[1] not in FLOORS:
        yield f"{room} imports {'.'.join(target)}, which is above all rooms"
    elif target[1] != room and FLOORS[target[1]] >= FLOORS[room]:
        way = "sideways" if FLOORS[target[1]] == FLOORS[room] else "up"
        yield f"{room} imports {target[1]}, an arrow {way}"


def test_imports_go_down() -> None:
    assert forbidden(PACKAGE) == []


def test_every_room_has_a_floor_and_says_what_it_is_for() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= set(FLOORS)
    for room in sorted(rooms):
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))), room


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("models/gpt.py", "from stretto.parallel.mesh import Mesh", "models imports parallel, an arrow sideways"),
        ("spec/run.py", "def f():\n    import stretto.trainer.loop", "spec imports trainer, an arrow up"),
        ("data/x.py", "from ..checkpoint import save", "data imports checkpoint, an arrow up"),
        ("data/deep/x.py", "from ...models import gpt", "data imports models, an arrow sideways"),
        ("trainer/x.py", "from stretto import train", "trainer imports stretto.train, which is above all rooms"),
        ("trainer/x.py", "def f():\n    import stretto", "trainer imports stretto, which is above all rooms"),
        ("planner/x.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass", "planner imports torch"),
        ("cli/x.py", "class A:\n    from torch import nn", "cli imports torch"),
        ("spec/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "spec imports torch"),
        ("attic/x.py", "", "attic has no floor"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, file: str, text: str, why: str) -> None:
    path = tmp_path / "stretto" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (found,) = forbidden(tmp_path / "stretto")
    assert why in found
    assert found.startswith(file)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("trainer/loop.py", "from stretto.models.gpt import Gpt\nimport stretto.spec.run"),
        ("models/gpt.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stretto.parallel import mesh"),
        ("cli/train.py", "def run():\n    import torch\n    from stretto.trainer import launch"),
        ("data/a.py", "from stretto.data.b import c\nfrom .b import d"),
        ("__init__.py", "import stretto.cli.verbs"),
    ],
)
def test_a_right_arrow_passes(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / "stretto" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert forbidden(tmp_path / "stretto") == []

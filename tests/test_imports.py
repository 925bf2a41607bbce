"""The rooms of rlopt: imports run one way, no circles, and one agent loads no other."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from rlopt.registry import AGENTS, get_agent

PACKAGE = Path(__file__).resolve().parents[1] / "rlopt"
FLOORS = [
    {"cli"}, {"search", "queue"}, {"training"}, {"loops", "runs"}, {"analysis"}, {"agents"}, {"policy", "fast"},
    {"robust", "buffers", "nn", "envs"},
]  # fmt: skip
"""Each room imports what is on its own floor (without circles) and below; under all of them lie the modules at the top
of the package (``types``, ``config``, ``random`` …)."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of rlopt by its dotted name."""
    files = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in files.items()}


def statements(node: ast.AST, lazy: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run: those for type checkers do not, and those inside functions only if ``lazy``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif lazy or not isinstance(child, ast.FunctionDef):
            yield from statements(child, lazy)


@functools.cache
def imports(name: str, lazy: bool = True) -> set[str]:
    """Return the modules of rlopt that a module imports by name."""
    found = set()
    for statement in statements(ast.parse(modules()[name].read_text(encoding="utf-8")), lazy):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif statement.module is not None:
            both = {alias.name: f"{statement.module}.{alias.name}" for alias in statement.names}
            found |= {whole if whole in modules() else statement.module for whole in both.values()}
    return {module for module in found if module in modules()} - {name}


def room(module: str) -> str:
    """Return the folder of rlopt in which a module lies, or nothing for one at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or ((PACKAGE / parts[-1]).is_dir() and len(parts) == 2) else ""


def test_every_room_has_a_floor() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set().union(*FLOORS)


def test_imports_run_one_way() -> None:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names} | {"": len(FLOORS)}
    entrances = {"rlopt.__main__", "rlopt"}  # the command, and names imported when first used
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        for other in imports(name)
        if name not in entrances and floor[room(name)] > floor[room(other)]
    ]
    assert wrong == []


def test_there_are_no_circles_of_modules() -> None:
    """Imports inside functions included: they hide a circle, they do not break it."""
    TopologicalSorter({name: imports(name) for name in modules()}).prepare()  # raises CycleError, which names them


def test_there_are_no_circles_of_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for name in modules():
        rooms.setdefault(room(name), set()).update(room(other) for other in imports(name))
    TopologicalSorter({a: {b for b in others if b and b != a} for a, others in rooms.items() if a}).prepare()


def loaded(name: str) -> set[str]:
    """Return all modules that importing one loads: of packages on the way, too."""
    found: set[str] = set()
    left = [name]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += [*imports(module, lazy=False), *([module.rpartition(".")[0]] if "." in module else [])]
    return found


@pytest.mark.parametrize("name", AGENTS)
def test_importing_an_agent_loads_no_other(name: str) -> None:
    """But those that it is made of."""
    cls = get_agent(name)
    homes = {get_agent(other).__module__ for other in AGENTS}
    together = [get_agent(other) for other in AGENTS if get_agent(other).__module__ == cls.__module__]
    built_on = {base.__module__ for one in together for base in one.__mro__}
    built_on |= {base.__module__ for one in together if hasattr(one, "learner") for base in one.learner.__mro__}
    assert loaded(cls.__module__) & homes <= built_on

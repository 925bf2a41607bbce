"""Mistakes in options, told before torch is imported.

``rlopt.config.build`` checks options by the classes that declare them, and those come with torch, which takes seconds.
What the source of these classes says is enough to know that there is no option of a name, and mostly its type and range
too. It is read here, never run, and judged by the same functions, so in the same words; where the source alone does not
tell, nothing is said, and ``build`` decides.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlopt.config import CALLED, checked_value, join, nearest, refuse
from rlopt.registry import AGENTS, target_text

GROUPS = ("eval", "log", "checkpoint")
"""Those of ``TrainConfig`` whose options are the same whatever is chosen."""
_KINDS: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)}, "Any": Any, "Literal": Literal,
}  # fmt: skip
_FACTS = ("low", "high", "above", "choices")


class Untold(Exception):
    """The source alone does not tell."""


class Declared(NamedTuple):
    """An option as a class body declares it."""

    kind: ast.expr
    default: ast.expr | None
    group: dict[str, Any] | None
    """The options below it, where it is a group."""


def refuse_mistakes(settings: Mapping[str, Any]) -> None:
    """Raise RloptError, as ``build_config`` would, where an option of the agent, of ``GROUPS`` or of the top level does
    not exist, or cannot have its value."""
    try:
        top = declared("rlopt.loops.configuration", "TrainConfig")
        agent = settings.get("agent")
        if isinstance(agent, Mapping) and isinstance(name := agent.get("name"), str):
            _refuse(agent, agent_options(name), "agent")
    except Untold:
        return
    for name in settings:
        if name not in top and name != "resume" and name.lower() not in CALLED and nearest(name, top):
            refuse(name, name, [*top, "resume"], "")
    for group in GROUPS:
        if isinstance(given := settings.get(group), Mapping):
            _refuse(given, top[group].group or {}, group)


def agent_options(name: str) -> dict[str, Declared]:
    """Return the options of a registered agent of rlopt's. Raises Untold for any other."""
    if name not in AGENTS:
        raise Untold(name)
    module, _, cls = target_text(name, AGENTS, "rlopt.agents").partition(":")
    return declared(*_config_class(module, cls))


@cache
def declared(module: str, name: str) -> dict[str, Declared]:
    """Return the options of a configuration class in the order of its fields. Raises Untold."""
    module, found = _find(module, name)
    options: dict[str, Declared] = {}
    for base in reversed(found.bases):
        options |= declared(module, _name(base))
    for line in found.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            options[line.target.id] = Declared(line.annotation, line.value, _group(module, line.annotation))
    return options


def names(options: Mapping[str, Declared], where: str = "") -> Iterator[str]:
    """Yield what ``rlopt.config.option_names`` gives of the class."""
    for name, option in options.items():
        if option.group is None:
            yield join(where, name)
        else:
            yield from names(option.group, join(where, name))


def _refuse(given: Mapping[str, Any], options: Mapping[str, Declared], where: str) -> None:
    for name in given:
        if name not in options:
            refuse(join(where, str(name)), str(name), options, where, [n for n in names(options) if "." in n])
    for name, option in options.items():
        value = given.get(name)
        if option.group is not None and isinstance(value, Mapping):
            _refuse(value, option.group, join(where, name))
        elif option.group is None and name in given and "${" not in str(value) and value != "???":
            try:
                kind, facts = _kind(option.kind), _facts(option.default)
            except Untold:
                continue
            checked_value(value, kind, facts, join(where, name))


def _kind(annotation: ast.expr) -> Any:
    """Return the type that an annotation means: a built-in one, ``Literal[…]``, ``tuple[int, ...]``, ``… | None``."""
    match annotation:
        case ast.Name(id=name) if name in _KINDS:
            return _KINDS[name]
        case ast.Constant(value=value):  # None, an ellipsis, what a Literal may be
            return value
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _kind(left) | _kind(right)
        case ast.Tuple(elts=parts):
            return tuple(_kind(part) for part in parts)
        case ast.Subscript(value=whole, slice=part):
            return _kind(whole)[_kind(part)]
    raise Untold(ast.unparse(annotation))  # it names something else


def _facts(default: ast.expr | None) -> dict[str, Any]:
    """Return the range and the choices that ``option(…)`` names."""
    if not (isinstance(default, ast.Call) and _name(default.func) == "option"):
        raise Untold
    try:
        return {word.arg: ast.literal_eval(word.value) for word in default.keywords if word.arg in _FACTS}
    except ValueError as error:
        raise Untold from error


def _group(module: str, annotation: ast.expr) -> dict[str, Declared] | None:
    """Return the options below one whose type is a configuration class."""
    if isinstance(annotation, ast.Name) and annotation.id.endswith("Config"):
        return declared(module, annotation.id)
    return None


def _config_class(module: str, name: str) -> tuple[str, str]:
    """Return where the class of an agent's options stands, and what it is called."""
    module, found = _find(module, name)
    for line in found.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "config_class" for target in targets):
            return module, _name(getattr(line, "value", None))
    for base in found.bases:
        try:
            return _config_class(module, _name(base))
        except Untold:
            continue
    raise Untold(name)


def _name(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Name):
        raise Untold
    return node.id


def _find(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """Return the class called ``name`` in a module, and the module that it was imported from."""
    for node in _lines(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(node.module, alias.name)
    raise Untold(f"{module}:{name}")


@cache
def _lines(module: str) -> list[ast.stmt]:
    """Return the top level of a module's source, what stands below an ``if`` included."""
    path = Path(__file__).parents[2].joinpath(*module.split("."))
    try:
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        body = ast.parse(path.read_bytes()).body
    except (OSError, ValueError, SyntaxError) as error:
        raise Untold(module) from error
    return [*body, *(line for node in body if isinstance(node, ast.If) for line in node.body)]

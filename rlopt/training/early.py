"""Mistakes in options, told before torch is imported.

``rlopt.config.build`` checks options by the classes that declare them, and those come with torch, which takes seconds.
What the source of these classes says is enough to know that there is no option of a name, and mostly its type and range
too. It is read here, never run, and judged by the same functions, so in the same words; where the source alone does not
tell, nothing is said, and ``build`` decides. Names of environments are Gymnasium's to know, which is imported for them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlopt.config import CALLED, checked_value, join, nearest, over, refuse
from rlopt.env_names import in_namespace, known, unknown
from rlopt.errors import RloptError
from rlopt.registry import AGENTS, SAMPLERS, agent_presets, register_games, target_text

CONFIGURATION = "rlopt.loops.configuration"
GROUPS = ("eval", "log", "checkpoint")
"""Those of ``TrainConfig`` whose options are the same whatever is chosen."""
_KINDS: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)}, "Any": Any, "Literal": Literal,
}  # fmt: skip
_FACTS = ("low", "high", "above", "choices")


class Untold(Exception):
    """The source alone does not tell."""


class Declared(NamedTuple):
    """An option as a class body, or a constructor's arguments, declare it."""

    kind: ast.expr | None
    default: ast.expr | None
    group: dict[str, Any] | None = None
    """The options below it, where it is a group."""
    argument: bool = False
    """Whether it is an argument of a constructor, which declares no range."""


def refuse_mistakes(settings: Mapping[str, Any]) -> None:
    """Raise RloptError, as ``build_config`` and ``find_spec`` would, where an option does not exist or cannot have its
    value, or where there is no such environment."""
    try:
        top = declared(CONFIGURATION, "TrainConfig")
        agent = settings.get("agent")
        name = agent.get("name") if isinstance(agent, Mapping) else None
        if isinstance(agent, Mapping) and isinstance(name, str):
            _refuse(agent, agent_options(name), "agent")
    except Untold:
        return
    with suppress(Untold):
        _refuse(*buffer_options(settings.get("buffer", {}), name if isinstance(name, str) else ""), "buffer")
    for word in settings:
        if word not in top and word != "resume" and word.lower() not in CALLED and nearest(word, top):
            refuse(word, word, [*top, "resume"], "")
    env = settings.get("env", {})
    with suppress(Untold):
        _refuse(env, env_options(env), "env")
    plain = {word: option for word, option in top.items() if option.group is None}
    _refuse({word: value for word, value in settings.items() if word in plain}, plain, "")
    for group in GROUPS:
        if isinstance(given := settings.get(group), Mapping):
            _refuse(given, top[group].group or {}, group)
    with suppress(Untold):
        _refuse_unknown_env(env)


def agent_options(name: str) -> dict[str, Declared]:
    """Return the options of a registered agent of rlopt's. Raises Untold for any other."""
    if name not in AGENTS:
        raise Untold(name)
    module, _, cls = target_text(name, AGENTS, "rlopt.agents").partition(":")
    return declared(*_config_class(module, cls))


def buffer_options(given: Any, agent: str) -> tuple[Mapping[str, Any], dict[str, Declared]]:
    """Return the options of the replay buffer that are ``given``, and those that there are for its sampler (and the
    one that it stands over). Raises Untold where it is not one of rlopt's."""
    if not isinstance(given, Mapping):
        raise Untold
    preset = {"name": "uniform", **agent_presets(agent).get("buffer", {})}
    if given.get("name", preset["name"]) == preset["name"]:
        given = over(preset, given)
    found, name = declared(CONFIGURATION, "BufferConfig"), given["name"]
    while name is not None:
        if name not in SAMPLERS:
            raise Untold(name)
        own = arguments(*target_text(name, SAMPLERS, "rlopt.samplers").split(":"))
        if "over" in own and "over" in found:
            raise Untold(name)  # one over another that stands over one
        found = {**found, **own}
        name = given.get("over", ast.literal_eval(own["over"].default or ast.Constant(None))) if "over" in own else None
    return given, found


def env_options(given: Any) -> dict[str, Declared]:
    """Return the options of the environment: its own arguments are looked up only where one is ``given``. Raises Untold
    where they are not to be had without importing it."""
    if not isinstance(given, Mapping):
        raise Untold
    found = declared(CONFIGURATION, "EnvConfig")
    if set(given) <= set(found):
        return found
    entry = known().get(str(given.get("id", "")), "")
    if ":" not in entry:
        raise Untold(entry)
    return {**arguments(*entry.split(":")), **found}


def _refuse_unknown_env(given: Any) -> None:
    """Raise RloptError where Gymnasium and rlopt have no such environment; Untold where only its module can tell."""
    id = given.get("id") if isinstance(given, Mapping) else None
    if not isinstance(id, str) or not id or ":" in id or "${" in id or in_namespace(id):
        raise Untold(id)
    with suppress(ModuleNotFoundError):
        register_games(id)
        if id not in known():
            raise RloptError(f"env={id} {unknown(id)}")


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


@cache
def arguments(module: str, name: str) -> dict[str, Declared]:
    """Return the arguments of a class's constructor that have defaults. Raises Untold."""
    module, found = _find(module, name)
    for line in found.body:
        if isinstance(line, ast.FunctionDef) and line.name == "__init__":
            own = line.args
            placed = own.args[len(own.args) - len(own.defaults) :]  # defaults belong to the last ones
            pairs = [*zip(placed, own.defaults, strict=False), *zip(own.kwonlyargs, own.kw_defaults, strict=True)]
            return {a.arg: Declared(a.annotation, d, argument=True) for a, d in pairs if d is not None}
    for base in found.bases:
        if _name(base) not in ("Protocol", "ABC"):
            return arguments(module, _name(base))
    return {}


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
            with suppress(Untold):
                facts = {} if option.argument else _facts(option.default)
                checked_value(value, _kind(option.kind), facts, join(where, name))


def _kind(annotation: ast.expr | None) -> Any:
    """Return the type that an annotation means: a built-in one, ``Literal[…]``, ``tuple[int, ...]``, ``… | None``."""
    match annotation:
        case None:
            return Any
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
    """Return the range and the choices that ``option(…)`` names, but for those that it computes."""
    if not (isinstance(default, ast.Call) and _name(default.func) == "option"):
        raise Untold
    found = {}
    for word in default.keywords:
        if word.arg in _FACTS:
            with suppress(ValueError):
                found[word.arg] = ast.literal_eval(word.value)
    return found


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
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(node.module, alias.name)
    raise Untold(f"{module}:{name}")


@cache
def _lines(module: str) -> list[ast.stmt]:
    """Return the top level of a module's source, what stands below an ``if`` included."""
    try:
        body = ast.parse(source_file(module).read_bytes()).body
    except (OSError, ValueError, SyntaxError) as error:
        raise Untold(module) from error
    return [*body, *(line for node in body if isinstance(node, ast.If) for line in node.body)]


def source_file(module: str) -> Path:
    """Return a module's file, without importing the packages above it. Raises Untold where it is not to be had."""
    first, *rest = module.split(".")
    path = Path(__file__).parents[1]
    if first != "rlopt":
        spec = find_spec(first)
        if spec is None or spec.origin is None:
            raise Untold(module)
        path = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin).with_suffix("")
    path = path.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

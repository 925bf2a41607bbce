"""``rlopt list``: names and one line about each, without importing what they stand for (and so without torch)."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlopt import registry
from rlopt.cli.arguments import KINDS
from rlopt.training.config_files import config_dirs, group_files, head_comment
from rlopt.training.early import Untold, source_file

Lines = dict[str, str]


def run(arguments: argparse.Namespace) -> int:
    """Print one kind, or all of them."""
    kind = arguments.kind
    if kind is not None and kind not in KINDS:
        from rlopt.config import hint
        from rlopt.errors import RloptError

        raise RloptError(f"rlopt list {kind}: no such kind; {hint(kind, KINDS)}")
    dirs = config_dirs(arguments.config_dir)
    if kind is not None:
        _print(_lines(kind, dirs), arguments.filter)
        return 0
    for each, title in (("agents", "agent="), ("buffers", "buffer="), ("experiments", "experiment=")):
        print(f"{each} ({title}NAME)")
        _print(_lines(each, dirs), None, indent="  ")
        print()
    print("envs (env=ID): any registered Gymnasium id, ALE/Name-v5, module:Name-v0; `rlopt list envs` shows them")
    print("networks (agent.network.encoder=NAME): `rlopt list networks` shows them")
    return 0


def _lines(kind: str, dirs: list[Path]) -> Lines:
    if kind == "agents":
        return _registered("agent", registry.agent_names(), registry.AGENTS, "rlopt.agents", dirs)
    if kind == "buffers":
        return _registered("buffer", registry.sampler_names(), registry.SAMPLERS, "rlopt.samplers", dirs)
    if kind == "experiments":
        return {name: head_comment(file) for name, file in group_files("experiment", dirs).items()}
    return _envs(dirs) if kind == "envs" else _networks()


def _registered(
    group: str, names: list[str], table: dict[str, registry.Entry], entry_group: str, dirs: list[Path]
) -> Lines:
    """Return what is registered, with its docstring's first line, and further configurations of the same group."""
    lines = {name: docstring_line(registry.target_text(name, table, entry_group)) for name in names}
    if group == "agent":
        lines = {name: f"{line} {_presets(registry.agent_presets(name))}".strip() for name, line in lines.items()}
    for name, file in group_files(group, dirs).items():
        lines.setdefault(name, head_comment(file))
    return dict(sorted(lines.items()))


def _presets(presets: Mapping[str, Any]) -> str:
    """Return what a name presets, as one would give it."""
    found = []
    for group, options in presets.items():
        rest = dict(options)
        found += [f"{group}={rest.pop('name')}"] if "name" in rest else []
        found += [f"{group}.{key}={value}" for key, value in rest.items()]
    return f"({', '.join(found)})" if found else ""


def _envs(dirs: list[Path]) -> Lines:
    import gymnasium

    registry.load_extensions()
    for package, beginning in (("ale_py", "ALE/"), ("minatar", "MinAtar/"), ("minigrid", "MiniGrid-")):
        if importlib.util.find_spec(package) is not None:
            registry.register_games(beginning)
    presets = {name: head_comment(file) for name, file in group_files("env", dirs).items() if name != "default"}
    registered = {name: _entry(spec.entry_point) for name, spec in sorted(gymnasium.registry.items())}
    return {**registered, **registry.TEAMS, **presets}


def _entry(target: object) -> str:
    """Return where a registered environment comes from; a bare function stands for a version that is gone."""
    return target if isinstance(target, str) else "" if target is None else "no longer supported by Gymnasium"


def _networks() -> Lines:
    from rlopt.nn.encoders import ENCODERS

    registry.load_extensions()
    return {name: _first_line(encoder.__doc__) for name, encoder in sorted(ENCODERS.items())}


def docstring_line(target: str) -> str:
    """Return the first line of the docstring of ``module:Class``, read from the source; empty where that is not to be
    had."""
    module, _, name = target.partition(":")
    try:
        tree = ast.parse(source_file(module).read_text(encoding="utf-8"))
    except (OSError, Untold, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _first_line(ast.get_docstring(node))
    return ""


def _first_line(text: str | None) -> str:
    return text.strip().splitlines()[0].strip() if text and text.strip() else ""


def _print(lines: Lines, wanted: str | None, indent: str = "") -> None:
    shown = {name: text for name, text in lines.items() if wanted is None or wanted.lower() in name.lower()}
    if not shown and wanted is not None:
        from rlopt.config import hint
        from rlopt.errors import RloptError

        raise RloptError(
            f"no name contains {wanted!r}; {hint(wanted, list(lines)) if len(lines) < 40 else _near(wanted, lines)}"
        )
    width = max(map(len, shown), default=0)
    for name, text in shown.items():
        print(f"{indent}{name:<{width}}  {text}".rstrip())


def _near(wanted: str, lines: Lines) -> str:
    from rlopt.config import nearest

    near = nearest(wanted, lines)
    return f"did you mean {near}?" if near else "leave the word out to see all"

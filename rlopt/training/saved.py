"""Configurations of saved runs: whether they still are what was trained, and what a stranger's file may name.

Nothing here imports what a file names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium

from rlopt.config import build, join, refuse, to_dict
from rlopt.loops.configuration import RESUMABLE, EnvConfig, TrainConfig, build_config, schedule_end
from rlopt.runs.checkpoint import saved_config
from rlopt.runs.run_folder import RunFolder
from rlopt.settings import Settings, parse_settings
from rlopt.types import RloptError

log = logging.getLogger(__name__)

KEPT = "a resumed run keeps its own; only total_steps, device, on_nonfinite and log.… go with resume="
MAX_STEPS = 100_000
"""Steps of an episode that a file may ask for which was not made here."""
_MAY_CHANGE = "only total_steps, device, on_nonfinite and log.… may change"


def saved_settings(folder: RunFolder) -> Settings:
    """Return a run's configuration, once it is known to be the one that its checkpoints were saved with: networks,
    buffers and streams in a checkpoint are those of that one.

    Raises:
        RloptError: it was changed or damaged in what a run keeps, or cannot be read.
    """
    found = folder.settings()
    saved = saved_config(folder.checkpoints)
    if saved is None:
        if found.intact is False:
            raise RloptError(
                f"{folder.config_path} is not as rlopt wrote it, and no checkpoint tells what it was; put back what "
                "was changed, or begin a new run"
            )
        return found
    # Both are completed first: a newer rlopt may have options that the older file lacks.
    before, now = (_completed(values) for values in (parse_settings(*saved).values, found.values))
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new or name == "run_dir":
            continue
        changed = f"{folder.config_path} was changed: {name} is {new or 'missing'}"
        if name.split(".")[0] not in RESUMABLE:
            trained = "without it" if old is None else f"with {old}"
            raise RloptError(
                f"{changed}, but the run was trained {trained}; put that back ({_MAY_CHANGE}), or begin a new run"
            )
        if not found.intact:
            log.warning("%s, and was %s", changed, old)
    return found


def _completed(values: Mapping[str, Any]) -> dict[str, str]:
    """Return every option as text, under its dotted name. Unknown words of ``env``, which might be arguments of what
    would have to be imported, are refused."""
    env = build(EnvConfig, values.get("env", {}), "env")
    return _flat(to_dict(build_config({**values, "env": env})), "")


def _flat(mapping: dict[Any, Any], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in mapping.items():
        name = join(where, str(key))
        found |= _flat(value, name) if isinstance(value, dict) else {name: str(value)}
    return found


def resumed_config(
    folder: RunFolder, changes: Mapping[str, Any], *, trust: bool = False, env_id: str | None = None
) -> TrainConfig:
    """Return the configuration with which a run goes on.

    Args:
        changes: options that a resume may change, nested or dotted.
        trust: whether what a run from elsewhere names may be imported.
        env_id: the user's word that the run's environment, if it is this one, may be imported.

    Raises:
        RloptError: see ``saved_settings`` and ``refuse_names``; an option may not change; the environment is another.
    """
    refuse_changes(changes)
    found = saved_settings(folder)
    env = build(EnvConfig, found.values.get("env", {}), "env")
    if env_id is not None and env_id != env.id:
        raise RloptError(f"env={env_id}: this run's environment is {env.id}, and a resumed run keeps its own")
    if not (trust or found.own):
        buffer = found.values.get("buffer")
        place = buffer.get("folder") if isinstance(buffer, dict) else None
        refuse_names(env, folder.path, env_id, "env=", place)
    return build_config(_changed(found.values, changes))


def refuse_changes(names: Iterable[str]) -> None:
    """Raise RloptError where an option is named, dotted or not, that a resumed run keeps."""
    words = list(TrainConfig.__dataclass_fields__)
    for name in names:
        top = name.partition(".")[0]
        if top not in words:
            refuse(name, top, words, "")
        if top not in RESUMABLE:
            raise RloptError(f"{name}: {KEPT}")


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with ``changes``, which are nested or dotted."""
    config = dict(values)
    for name, value in changes.items():
        inner = name.removeprefix("log.")
        if inner != name:
            value = {inner: value}
        nested = name.startswith("log") and isinstance(value, Mapping)
        config["log" if nested else name] = {**(config.get("log") or {}), **value} if nested else value
    return config


def refuse_names(env: EnvConfig, where: Path, env_id: str | None, way: str, buffer_folder: Any = None) -> None:
    """Refuse what a file that someone else may have written must not choose: what is imported, which files are read,
    where files go, and work without an end.

    Args:
        env: what the file says of its environment.
        where: the folder it lies in.
        env_id: the environment that the user has named.
        way: how the user names one.

    Raises:
        RloptError: the first such name, and what the user can say to allow it.
    """
    allow = f"if you trust {where}, which was not made here, add --trust (from Python: trust=True)"
    if env_id is None and ":" in env.id:
        raise RloptError(
            f"this file names a module ({env.id}), which no file may choose to import; {allow}, or {way}{env.id}"
        )
    both = (env, env.for_evaluation())
    wrappers = [wrapper for each in both for wrapper in each.wrappers]
    for wrapper in wrappers:
        name = wrapper if isinstance(wrapper, str) else str(wrapper.get("class"))
        if name not in gymnasium.wrappers.__all__ or name.startswith("Record"):
            raise RloptError(f"this file names the wrapper {name}, which no file may choose; {allow}")
    arguments: list[tuple[str, Any]] = [("env.kwargs", each.kwargs) for each in both if env_id in (None, env.id)]
    arguments += [("env.wrappers", wrapper.get("kwargs")) for wrapper in wrappers if isinstance(wrapper, dict)]
    for key, value in (leaf for name, values in arguments for leaf in _leaves(values, name)):
        if isinstance(value, str) and set(value) & set("/\\:"):
            raise RloptError(f"this file has {key}={value!r}, which may name a file or a module; {allow}")
        if key.endswith("max_episode_steps") and isinstance(value, int | float) and value > MAX_STEPS:
            raise RloptError(f"this file asks for {key}={value:g}, more than {MAX_STEPS}; {allow}")
    if buffer_folder is not None:
        raise RloptError(f"this file names a folder to write to (buffer.folder={buffer_folder}); {allow}")


def _leaves(tree: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _leaves(child, join(where, str(key)))
    elif isinstance(tree, list | tuple):
        for child in tree:
            yield from _leaves(child, where)
    else:
        yield where, tree


def refuse_dead_rate(folder: RunFolder, config: TrainConfig) -> None:
    """Refuse a run that is extended beyond its schedule: it would learn no more, and nothing would tell."""
    saved, end = saved_config(folder.checkpoints), schedule_end(config)
    before = folder.config() if saved is None else parse_settings(*saved).values
    if end is None or config.total_steps <= max(end, before.get("total_steps", 0)):
        return
    kind, final = (getattr(config.agent, name, 0.0) for name in ("lr_schedule", "final_learning_rate"))
    what, option = ("clip", "clip_schedule") if kind == "constant" else ("learning rate", "lr_schedule")
    if final == 0.0:
        raise RloptError(
            f"total_steps={config.total_steps}: this run's {what} is 0 from step {end} on "
            f"(agent.{option}={getattr(config.agent, option)}); begin a new run with that many steps, or with "
            f"agent.{option}=constant"
        )
    log.warning("from step %d on the learning rate stays at %g of what it began with (%s)", end, final, kind)

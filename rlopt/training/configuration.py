"""What a training run is told: the top level of ``config.yaml``, checked and complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gymnasium.envs.registration import load_env_creator

from rlopt.config import build, build_call, call_options, join, option_names, refuse, to_dict
from rlopt.envs.factory import find_spec
from rlopt.nn import PRECISIONS
from rlopt.registry import get_agent, get_sampler
from rlopt.types import RloptError, option

Wrapper = str | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The environment, as ``rlopt.envs.make_env`` takes it."""

    id: str = option("Pendulum-v1", "a registered id, ALE/Name-v5, or module:Name-v0")
    backend: str = option("auto", "how copies are run: auto, native, sync, async, vector, envpool, torch, warp")
    kwargs: dict[str, Any] = option(dict, "keyword arguments of the environment")
    wrappers: tuple[Wrapper, ...] = option(
        (), "Gymnasium wrappers, innermost first: Name, module:Name, {class, kwargs}"
    )
    timeout: float = option(60.0, "seconds that one step of a worker process may take", above=0.0)
    normalize_obs: bool = option(False, "divide observations by running statistics, frozen in evaluation")
    normalize_reward: bool = option(False, "divide rewards by the running deviation of the discounted return")


@dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """The replay buffer; the sampler's own options stand beside these."""

    name: str = option("uniform", "a registered sampler")
    capacity: int = option(1_000_000, "transitions kept", low=1)
    device: str = option("auto", "where the data lies: auto (the agent's device), cpu, cuda, disk (a mapped file)")
    folder: str | None = option(None, "where device=disk makes its file (null: the current directory)")
    frame_stack: int | None = option(
        None, "frames stacked in each uint8 image, to store every frame once (null: images as they come)", low=1
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on separate environments with their own seeds."""

    every: int | None = option(5_000, "steps between evaluations (null: at the end only)", low=1)
    episodes: int = option(10, "episodes per evaluation", low=1)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training; may be changed by resume."""

    every: int = option(1_000, "steps between rows of metrics.csv", low=1)
    tensorboard: bool = option(True, "write TensorBoard files as well")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved. The end, Ctrl-C and SIGTERM always save."""

    minutes: float | None = option(10.0, "minutes between checkpoints (null: never by the clock)", above=0.0)
    every_steps: int | None = option(None, "steps between checkpoints (null: never by the count)", low=1)
    keep: int = option(2, "checkpoints kept, the newest included", low=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    ``agent`` and ``buffer`` are plain mappings, because the classes that their ``name`` stands for own their options;
    ``train_config`` has checked and completed them, and ``agent_config`` and ``sampler_options`` read them.
    """

    seed: int = option(0, "every random stream derives from it", low=0)
    total_steps: int = option(1_000_000, "environment steps (or a solver's iterations), reached exactly", low=1)
    num_envs: int = option(1, "environments stepped together", low=1)
    num_runs: int = option(1, "runs trained side by side, with the seeds seed, seed + 1 …", low=1)
    overlap: bool = option(False, "step the environments in a thread of their own while the agent learns")
    device: str = option("auto", "auto (the GPU where there is one), cpu, cuda, cuda:1 …")
    precision: str = option("float32", "of the products between hidden layers in an update", choices=tuple(PRECISIONS))
    update_mode: str = option(
        "auto",
        "eager, captured (one CUDA graph per update), auto (captured where it can be)",
        choices=("auto", "eager", "captured"),
    )
    threads: int | Literal["auto"] = option("auto", "CPU threads of torch: auto or a number", low=1)
    run_dir: str | None = option(None, "the run folder (null: runs/<agent>-<env>-s<seed>-<time>)")
    experiment: str | None = option(None, "the preset under configs/experiment that this run began from")
    on_nonfinite: str = option("stop", "after a non-finite value was kept from the weights", choices=("stop", "skip"))
    agent: dict[str, Any] = option(lambda: {"name": "sac"}, "name and options of the agent")
    env: EnvConfig = option(EnvConfig, "the environment")
    buffer: dict[str, Any] = option(lambda: {"name": "uniform"}, "name and options of the replay buffer")
    eval: EvalConfig = option(EvalConfig, "evaluation")
    log: LogConfig = option(LogConfig, "logging")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "checkpoints")


RESUMABLE = ("total_steps", "device", "on_nonfinite", "log")
"""What may be changed when a run is resumed; ``log`` stands for every ``log.…`` option."""


def train_config(mapping: Mapping[str, Any]) -> TrainConfig:
    """The checked, complete configuration of a run from a mapping such as a composed or a saved ``config.yaml``.

    Raises RloptError in one line that names the option: unknown, of a wrong type, out of range, or not registered.
    """
    agent = complete_agent(mapping.get("agent", {"name": "sac"}))
    buffer = complete_buffer(mapping.get("buffer", {"name": "uniform"}))
    for name in mapping:
        words = list(TrainConfig.__dataclass_fields__)
        if name not in words:
            words.append("resume")
            groups = {"agent": agent, "buffer": buffer}
            inner = [join(group, key) for group, options in groups.items() for key in options]
            refuse(str(name), str(name), words, "", [*inner, *(n for n in option_names(TrainConfig) if "." in n)])
    env = complete_env(mapping.get("env", {}))
    return build(TrainConfig, {**mapping, "agent": agent, "buffer": buffer, "env": env}, where="")


def complete_agent(mapping: Any) -> dict[str, Any]:
    """``agent`` with every option of the named agent checked and filled in."""
    name, options = _named(mapping, "agent")
    return {"name": name, **to_dict(build(get_agent(name).config_class, options, "agent"))}


def complete_buffer(mapping: Any) -> dict[str, Any]:
    """``buffer`` with every option of the buffer and of the named sampler checked and filled in."""
    name, options = _named(mapping, "buffer")
    sampler = get_sampler(name)
    own = BufferConfig.__dataclass_fields__
    of_sampler = call_options(sampler)
    for key in options:
        if key not in own and key not in of_sampler:
            refuse(join("buffer", key), key, [*own, *of_sampler], "buffer")
    base = build(BufferConfig, {"name": name, **{k: v for k, v in options.items() if k in own}}, "buffer")
    rest = {k: v for k, v in options.items() if k not in own}
    return {**to_dict(base), **build_call(sampler, rest, "buffer")}


def complete_env(mapping: Any) -> Any:
    """``env`` with the environment's own arguments, such as ``env.states=10``, moved to ``env.kwargs``."""
    own = EnvConfig.__dataclass_fields__
    if not isinstance(mapping, Mapping) or not (given := [key for key in mapping if key not in own]):
        return mapping
    id = mapping.get("id", EnvConfig().id)
    entry = find_spec(id).entry_point if isinstance(id, str) else None
    of_env = call_options(load_env_creator(entry) if isinstance(entry, str) else entry) if entry else {}
    for key in given:
        if key not in of_env:
            refuse(join("env", str(key)), str(key), [*own, *of_env], "env")
    kwargs = {**(mapping.get("kwargs") or {}), **{key: mapping[key] for key in given}}
    return {**{key: mapping[key] for key in mapping if key in own}, "kwargs": kwargs}


def agent_config(config: TrainConfig) -> Any:
    """The named agent's own configuration object."""
    name, options = _named(config.agent, "agent")
    return build(get_agent(name).config_class, options, "agent")


def schedule_end(config: TrainConfig) -> int | None:
    """The step from which the learning rate stays where its schedule ends; None where it is constant."""
    if config.agent.get("lr_schedule", "constant") == "constant":
        return None
    return config.agent.get("schedule_steps") or config.total_steps


def buffer_config(config: TrainConfig) -> BufferConfig:
    """Capacity, place and layout of the replay buffer."""
    own = BufferConfig.__dataclass_fields__
    return build(BufferConfig, {k: v for k, v in config.buffer.items() if k in own}, "buffer")


def sampler_options(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of the named sampler: ``get_sampler(config.buffer["name"])(**sampler_options(config))``."""
    own = BufferConfig.__dataclass_fields__
    return {k: v for k, v in config.buffer.items() if k not in own}


def _named(mapping: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
        raise RloptError(f"{where}: needs a name; write {where}=NAME (see `rlopt list {where}s`)")
    return mapping["name"], {str(k): v for k, v in mapping.items() if k != "name"}

"""What a run is told: the top level of ``config.yaml``, checked and complete. Loops build themselves from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from gymnasium.envs.registration import load_env_creator

from rlopt.agents.base import AgentConfig
from rlopt.buffers.samplers.base import Sampler
from rlopt.buffers.samplers.sequence import SequenceConfig
from rlopt.config import build, call_options, checked, join, option_names, over, refuse, with_arguments
from rlopt.envs.atari import PROTOCOLS
from rlopt.envs.factory import find_spec
from rlopt.envs.make import MOST_ENVS, TIMEOUT
from rlopt.envs.teams.names import one_name
from rlopt.nn import PRECISIONS
from rlopt.registry import agent_names, agent_presets, get_agent, get_sampler, sampler_names
from rlopt.types import RloptError, option

Wrapper = str | dict[str, Any]


MOST_RUNS, MOST_EPISODES = 1_024, 1_000_000
"""More are a slip of the finger, and would take for ever."""
TRACKERS = ("wandb", "mlflow", "trackio")
"""Those of ``rlopt.runs.trackers``."""
EVALUATION = ("kwargs", "wrappers", "facts")
"""What may differ between the environments of training and of evaluation."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The environment, as ``rlopt.envs.make_env`` takes it."""

    id: str = option("Pendulum-v1", "a registered id, ALE/Name-v5, or module:Name-v0")
    backend: str = option(
        "auto", "how copies run: auto, native, sync, async, vector, envpool, atari, torch, warp, vmas"
    )
    protocol: str | None = option(
        None,
        "how an Atari game is played and paid for: classic, dopamine (null: dopamine, but classic for …NoFrameskip-v4)",
        choices=tuple(PROTOCOLS),
    )
    kwargs: dict[str, Any] = option(dict, "keyword arguments of the environment")
    wrappers: tuple[Wrapper, ...] = option(
        (), "Gymnasium wrappers, innermost first: Name, module:Name, {class, kwargs}"
    )
    facts: tuple[str, ...] = option(
        (), "entries of an episode's last info (success …) that become columns of episodes and evaluations"
    )
    timeout: float = option(TIMEOUT, "seconds that one step of a worker process may take (async)", above=0.0)
    normalize_obs: bool = option(False, "divide observations by running statistics, frozen in evaluation")
    normalize_reward: bool = option(False, "divide rewards by the running deviation of the discounted return")
    evaluation: dict[str, Any] = option(
        dict, "what differs in evaluations: kwargs (added to kwargs), wrappers, facts (instead of these)"
    )

    def __post_init__(self) -> None:
        if isinstance(self.id, str) and isinstance(self.kwargs, Mapping):
            id, kwargs = one_name(self.id, self.kwargs)
            object.__setattr__(self, "id", id)
            object.__setattr__(self, "kwargs", kwargs)
        self.for_evaluation()

    def for_evaluation(self) -> EnvConfig:
        """Return the environment that evaluations run in."""
        if not self.evaluation:
            return self
        for name in self.evaluation:
            if name not in EVALUATION:
                refuse(join("env.evaluation", name), name, EVALUATION, "env.evaluation")
        changed = {**self.evaluation, "evaluation": {}}
        if isinstance(changed.get("kwargs"), Mapping):
            changed["kwargs"] = {**self.kwargs, **changed["kwargs"]}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return build(EnvConfig, {**own, **changed}, "env.evaluation")


@dataclass(frozen=True, kw_only=True)
class BufferConfig(SequenceConfig):
    """The replay buffer; the sampler's own options stand beside these."""

    name: str = option("uniform", "a registered sampler")
    capacity: int = option(1_000_000, "transitions kept", low=1, high=10**12)
    device: str = option("auto", "where the data lies: auto (the agent's device), cpu, cuda, disk (a mapped file)")
    folder: str | None = option(
        None, "where device=disk makes its file (null: the current directory)", needs={"device": ("disk",)}
    )
    frame_stack: int | None = option(
        None, "frames stacked in each uint8 image, to store every frame once (null: as the environment says)", low=1
    )

    @property
    def chooser(self) -> str:
        """The sampler that chooses transitions: ``name``, or ``over`` where that one stands over another."""
        return str(getattr(self, "over", self.name))

    def make_sampler(self) -> Sampler:
        """Return a new sampler that chooses transitions, with its own options, which a subclass of ``buffer_class``
        adds."""
        cls = get_sampler(self.chooser)
        sampler: Sampler = cls(**{name: getattr(self, name) for name in call_options(cls)})
        return sampler

    def stand_over(self, sampler: Sampler, make_env: Callable[[], Any]) -> Sampler:
        """Return the sampler of this name over ``sampler``, with one more environment, where it is such a one; else
        ``sampler``, or its slices (``wrap``)."""
        if self.chooser == self.name:
            return self.wrap(sampler)
        if self.sequence_length is not None:
            raise RloptError(f"buffer={self.name} draws single transitions; leave buffer.sequence_length out")
        cls = get_sampler(self.name)
        options = {name: getattr(self, name) for name in call_options(cls)}
        made: Sampler = cls(make_env(), **{**options, "over": sampler})
        return made


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on separate environments with their own seeds."""

    every: int | None = option(5_000, "steps between evaluations (null: at the end only)", low=1)
    at_start: bool = option(True, "evaluate the untrained policy too, where curves begin (unless every=null)")
    episodes: int = option(10, "episodes per evaluation", low=1, high=MOST_EPISODES)
    max_steps: int | None = option(
        None, "steps after which an episode is cut off (null: the environment's limit, or 27000 if it has none)", low=1
    )
    mode: str = option(
        "agent",
        "how policies act: deterministic, sample, agent (as that says)",
        choices=("agent", "deterministic", "sample"),
    )
    epsilon: float | None = option(
        None, "fraction of actions that are random all the same (null: as the agent says)", low=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training; may be changed by resume."""

    every: int = option(1_000, "steps between rows of metrics.csv", low=1)
    tensorboard: bool = option(True, "write TensorBoard files as well")
    video_every: int | None = option(
        None, "steps between films of an evaluation's first episode, in videos/ and trackers (null: none)", low=1
    )
    to: tuple[str, ...] = option((), "trackers that get the numbers too: wandb, mlflow, trackio", choices=TRACKERS)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved. The end, Ctrl-C and SIGTERM always save."""

    minutes: float | None = option(10.0, "minutes between checkpoints (null: never by the clock)", above=0.0)
    every_steps: int | None = option(None, "steps between checkpoints (null: never by the count)", low=1)
    keep: int = option(2, "checkpoints kept, the newest included", low=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. ``agent`` is of the class that the named agent declares, ``buffer`` of ``buffer_class``."""

    seed: int = option(0, "every random stream derives from it", low=0)
    total_steps: int = option(
        1_000_000, "environment steps (or a solver's iterations), reached exactly", low=1, high=10**15
    )
    num_envs: int = option(1, "environments stepped together", low=1, high=MOST_ENVS)
    num_runs: int = option(1, "runs trained side by side, with the seeds seed, seed + 1 …", low=1, high=MOST_RUNS)
    overlap: bool = option(False, "step the environments in a thread of their own while the agent learns")
    device: str = option("auto", "auto (the GPU where there is one), cpu, cuda, cuda:1 …")
    precision: str = option("float32", "of the products between hidden layers in an update", choices=tuple(PRECISIONS))
    update_mode: str = option(
        "auto",
        "eager, captured (updates as CUDA graphs), auto (captured where it can be)",
        choices=("auto", "eager", "captured"),
    )
    threads: int | Literal["auto"] = option("auto", "CPU threads of torch: auto or a number", low=1, high=1_024)
    run_dir: str | None = option(None, "the run folder (null: runs/<agent>-<env>-s<seed>-<time>)")
    experiment: str | None = option(None, "the preset under configs/experiment that this run began from")
    on_nonfinite: str = option("stop", "after a non-finite value was kept from the weights", choices=("stop", "skip"))
    agent: AgentConfig = option(lambda: agent_config({"name": "sac"}), "name and options of the agent")
    env: EnvConfig = option(EnvConfig, "the environment")
    buffer: BufferConfig = option(lambda: buffer_config({"name": "uniform"}), "name and options of the replay buffer")
    eval: EvalConfig = option(EvalConfig, "evaluation")
    log: LogConfig = option(LogConfig, "logging")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "checkpoints")


RESUMABLE = ("total_steps", "device", "on_nonfinite", "log")
"""What may be changed when a run is resumed; ``log`` stands for every ``log.…`` option."""


def build_config(mapping: Mapping[str, Any]) -> TrainConfig:
    """Return the checked, complete configuration of a run from a mapping such as a saved ``config.yaml``, in which no
    preset is looked up (see ``rlopt.training.train_config``).

    Raises RloptError in one line that names the option: unknown, of a wrong type, out of range, or not registered.
    """
    agent = agent_config(mapping.get("agent", {"name": "sac"}))
    buffer = buffer_config(mapping.get("buffer", {}), agent.name)
    for name in mapping:
        words = list(TrainConfig.__dataclass_fields__)
        if name not in words:
            groups = {"agent": type(agent), "env": EnvConfig, "buffer": type(buffer)}
            inner = [n for group, cls in groups.items() for n in option_names(cls, group)]
            inner += [n for n in option_names(TrainConfig) if "." in n]
            refuse(str(name), str(name), [*words, "resume"], "", inner)
    env = _with_own_arguments(mapping.get("env", {}))
    config = build(TrainConfig, {**mapping, "agent": agent, "buffer": buffer, "env": env}, where="")
    return config if config.run_dir is None else replace(config, run_dir=os.path.expanduser(config.run_dir))


def agent_config(options: Any) -> AgentConfig:
    """Return the checked options of the agent that ``options``, a mapping or such an object, name; what they leave out
    is as the name presets it."""
    if isinstance(options, Mapping) and isinstance(name := options.get("name"), str):
        options = over(agent_presets(name).get("agent", {}), options)
    return _options(options, "agent", lambda name: get_agent(name).config_class)  # type: ignore[no-any-return]


def buffer_config(options: Any, agent: str | None = None) -> BufferConfig:
    """Return the checked options of the replay buffer and of the sampler that ``options`` name; what they leave out is
    as the name of the ``agent`` presets it."""
    preset = {"name": "uniform", **agent_presets(agent or "").get("buffer", {})}
    if isinstance(options, Mapping) and options.get("name", preset["name"]) == preset["name"]:
        options = over(preset, options)

    def class_of(name: str) -> type[BufferConfig]:
        sampler = get_sampler(name)
        below = call_options(sampler).get("over")
        if below is None:
            return buffer_class(sampler)
        given = options.get("over", below) if isinstance(options, Mapping) else getattr(options, "over", below)
        chooser = get_sampler(str(given))
        if "over" in call_options(chooser):
            raise RloptError(f"buffer.over={given} stands over another sampler itself; name a plain one")
        return buffer_class(sampler, chooser)

    return _options(options, "buffer", class_of)  # type: ignore[no-any-return]


@cache
def buffer_class(*samplers: type[Any]) -> type[BufferConfig]:
    """Return ``BufferConfig`` with the samplers' own options: those arguments of their constructors that have
    defaults."""
    found: type[BufferConfig] = BufferConfig
    for sampler in samplers:
        found = with_arguments(found, sampler)
    return found


def schedule_end(config: TrainConfig) -> int | None:
    """Return the step from which the learning rate, or PPO's clip, stays where its schedule ends; None where they are
    constant."""
    if all(getattr(config.agent, name, "constant") == "constant" for name in ("lr_schedule", "clip_schedule")):
        return None
    return getattr(config.agent, "schedule_steps", None) or config.total_steps


def _options(options: Any, where: str, class_of: Callable[[str], type[Any]]) -> Any:
    """Return checked options of the class that belongs to their name."""
    name = options.get("name") if isinstance(options, Mapping) else getattr(options, "name", None)
    if not isinstance(name, str):
        words = {"agent": agent_names, "buffer": sampler_names}[where]()
        raise RloptError(f"{where}: needs a name; give one of {', '.join(words)}")
    cls = class_of(name)
    return checked(options, where) if isinstance(options, cls) else build(cls, options, where)


def _with_own_arguments(options: Any) -> Any:
    """Return ``env`` with the environment's own arguments, such as ``env.states=10``, moved to ``env.kwargs``."""
    own = EnvConfig.__dataclass_fields__
    if not isinstance(options, Mapping) or not (given := [key for key in options if key not in own]):
        return options
    id = options.get("id", EnvConfig().id)
    entry = find_spec(id).entry_point if isinstance(id, str) else None
    try:
        of_env = call_options(load_env_creator(entry) if isinstance(entry, str) else entry) if entry else {}
    except Exception:  # what it needs is missing, as making it tells
        of_env = dict.fromkeys(given)
    for key in given:
        if key not in of_env:
            refuse(join("env", str(key)), str(key), [*own, *of_env], "env")
    kwargs = {**(options.get("kwargs") or {}), **{key: options[key] for key in given}}
    return {**{key: options[key] for key in options if key in own}, "kwargs": kwargs}

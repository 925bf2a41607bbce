"""Training in one call from a program."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import gymnasium

from rlopt.agents.base import AgentConfig
from rlopt.envs.torch_env import TorchEnv
from rlopt.loops.configuration import EnvConfig
from rlopt.runs.display import Display
from rlopt.runs.run_folder import RunFolder
from rlopt.training import setup
from rlopt.training.presets import train_config
from rlopt.training.result import INTERRUPTED, Result
from rlopt.training.saved import refuse_changes
from rlopt.training.trainer import Callback
from rlopt.types import RloptError

LOCAL = "local/"
"""Namespace of environments that a program gave as an object."""

AnyEnv = str | Mapping[str, Any] | EnvConfig | gymnasium.Env[Any, Any] | Callable[..., Any]


def train(
    agent: str | Mapping[str, Any] | AgentConfig | None = None,
    env: AnyEnv | None = None,
    *,
    experiment: str | None = None,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    config_dir: str | Path | Sequence[str | Path] = (),
    trust: bool = False,
    without_lost_rows: bool = False,
    **options: Any,
) -> Result:
    """Train an agent, or go on with a run, and return how it ended and what it found.

    The words are those of the command line: a name, a preset or a file for ``agent``, ``env``, ``buffer`` and
    ``experiment``, and any option of ``rlopt train --options`` by keyword, nested or dotted::

        result = rlopt.train("sac", "Pendulum-v1", total_steps=10_000, seed=3, eval={"every": 1_000})
        result = rlopt.train("sac", lambda: MyEnv(size=3), **{"agent.learning_rate": 1e-3, "buffer": "reshuffled"})
        result = rlopt.train(experiment="sac_hopper_v4", run_dir="runs/mine")
        result = rlopt.train(resume="runs/mine", total_steps=2_000_000)
        result.evaluations, result.folder, rlopt.load_policy(result.folder)

    Args:
        agent: a name, a mapping with a ``name`` and options, or an agent's configuration with a name.
        env: an id, a mapping with an ``id`` and options, a function (or class) that makes a Gymnasium environment, a
            ``TorchEnv`` class, or one Gymnasium environment, which is copied and not touched. A run in an environment
            that was given as an object goes on only in a program that gives it again.
        experiment: a preset; what is given beside it wins over it.
        resume: the folder of a run to go on with; beside it only ``total_steps``, ``device``, ``on_nonfinite`` and
            ``log`` may be given (and ``env`` again, if it was an object).
        callbacks: see ``rlopt.training.Callback``.
        progress: whether to show how far the run is.
        config_dir: further folders of config groups.
        trust: whether what a resumed run from elsewhere names may be imported.
        without_lost_rows: whether to resume although rows of the replay buffer are damaged or gone.

    Raises:
        RloptError: a mistake in the options, told in one line.
        KeyboardInterrupt: Ctrl-C, once the run has been saved.
    """
    given = {"agent": agent, "experiment": experiment, **options}
    given = {name: value for name, value in given.items() if value is not None}
    own = None if env is None or isinstance(env, str | Mapping | EnvConfig) else register(env)
    display = None
    if resume is not None:
        folder = Path(resume).expanduser()
        if own is None and env is not None:
            given["env"] = env
        refuse_changes(given)
        _refuse_environment(folder, own)
        total = given.get("total_steps", RunFolder(folder).config().get("total_steps", 0))
        display = Display(int(total)) if progress else None
        trainer = setup.resume(
            folder, given, callbacks, display, trust=trust, env_id=own, without_lost_rows=without_lost_rows
        )
    else:
        if env is None and experiment is None:
            raise RloptError("env: name an environment, such as env='Pendulum-v1', or an experiment")
        chosen = env if own is None else own
        config = train_config(given if chosen is None else {**given, "env": chosen}, config_dir)
        display = Display(config.total_steps) if progress else None
        trainer = setup.begin(config, callbacks, display)
    with trainer:
        if display is not None:
            display.message(f"run folder: {trainer.folder.path}")
        result = trainer.run()
    if result.status == INTERRUPTED:
        raise KeyboardInterrupt(f"stopped at step {result.step}; rlopt.train(resume={str(result.folder)!r}) goes on")
    return result


def register(env: gymnasium.Env[Any, Any] | Callable[..., Any]) -> str:
    """Register an environment that was given as an object, and return the id that it now has in this process.

    Raises:
        RloptError: it is no environment, or one that cannot be copied.
    """
    if isinstance(env, type) and issubclass(env, TorchEnv):
        return f"{env.__module__}:{env.__qualname__}"
    if isinstance(env, gymnasium.Env):
        name, make = type(env.unwrapped).__name__, cast(Callable[..., Any], _copies(env))
    elif callable(env):
        name, make = getattr(env, "__name__", type(env).__name__), env
    else:
        what = "an id, options, a function that makes a Gymnasium environment, or such an environment"
        raise RloptError(f"env={env!r}: expected {what}")
    id = LOCAL + (re.sub(r"\W", "", name).replace("lambda", "") or "Env") + "-v0"
    gymnasium.registry.pop(id, None)  # what is given last is meant
    gymnasium.register(id, entry_point=cast(Any, make))
    return id


def _copies(env: gymnasium.Env[Any, Any]) -> Callable[[], gymnasium.Env[Any, Any]]:
    """Return a function that makes copies of ``env`` as it is now."""
    try:
        template = copy.deepcopy(env)
    except Exception as e:  # whatever its parts raise
        raise RloptError(
            f"env: this {type(env.unwrapped).__name__} cannot be copied ({' '.join(str(e).split())}); give a function "
            "that makes one, such as env=lambda: MyEnv()"
        ) from e
    return lambda: copy.deepcopy(template)


def _refuse_environment(folder: Path, given: str | None) -> None:
    """Refuse to resume a run in another environment, or without the one that only its program has."""
    options = RunFolder(folder).config().get("env")
    id = options.get("id") if isinstance(options, dict) else None
    if isinstance(id, str) and id.startswith(LOCAL) and given is None and id not in gymnasium.registry:
        raise RloptError(f"{folder} was trained in an environment that its program gave as an object; give env= again")
    if given is not None and given != id:
        raise RloptError(f"env: {folder} was trained in {id}, not in {given}; a resumed run keeps its own")

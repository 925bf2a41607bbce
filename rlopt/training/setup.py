"""From a checked configuration to a trainer that is ready to run. The command line and programs both come through
here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from rlopt.agents.base import Agent
from rlopt.buffers import ReplayBuffer
from rlopt.buffers.samplers.base import Sampler
from rlopt.buffers.samplers.per_run import RunSamplers
from rlopt.config import join, to_dict
from rlopt.envs import Normalizer, VectorEnv, make_env
from rlopt.envs.make import resolve_backend, stepping_device
from rlopt.loops.base import Loop
from rlopt.loops.captured import has_graphs, why_not
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.group import GroupLoop
from rlopt.loops.replay import ReplayLoop
from rlopt.loops.robust import RobustLoop
from rlopt.loops.solver import SolverLoop
from rlopt.registry import get_agent, get_sampler, load_extensions
from rlopt.runs.checkpoint import estimate_bytes, saved_config
from rlopt.runs.run_folder import RunFolder, default_run_dir, parse_config
from rlopt.training.configuration import (
    RESUMABLE,
    TrainConfig,
    agent_config,
    buffer_config,
    sampler_options,
    schedule_end,
    train_config,
)
from rlopt.training.trainer import Callback, Trainer
from rlopt.types import RloptError, resolve_device

log = logging.getLogger(__name__)


def train(config: TrainConfig, callbacks: Sequence[Callback] = (), display: Any = None) -> Trainer:
    """A trainer for a new run in ``config.run_dir``; call ``run`` and then ``close`` on it.

    Raises RloptError where the agent cannot act in the environment, the buffer does not fit, or the folder holds a run.
    """
    config = settle(config)
    loop = make_loop(config)
    try:
        path = Path(config.run_dir or default_run_dir(config.agent["name"], config.env.id, config.seed))
        folder = RunFolder.create(path, to_dict(config))
        try:
            return make_trainer(config, loop, folder, callbacks, display)
        except BaseException:
            folder.close()
            raise
    except BaseException:
        loop.close()
        raise


def resume(
    run: str | Path, changes: dict[str, Any], callbacks: Sequence[Callback] = (), display: Any = None
) -> Trainer:
    """A trainer that goes on exactly where the newest sound checkpoint of ``run`` stood.

    ``changes`` are top-level options that may change: ``total_steps``, ``device``, ``on_nonfinite`` and ``log``.

    Raises RloptError where the configuration is not the one that the checkpoints were saved with, where the run would
    outlive its learning rate, where the buffer no longer fits, or where no checkpoint is sound or left. A run that was
    killed before its first checkpoint begins again, with a warning.
    """
    folder = RunFolder.open(Path(run))
    try:
        config = settle(train_config({**folder.config(), **changes}))
        _refuse_edits(folder)
        _refuse_dead_rate(folder, config)
        loop = make_loop(config)
        try:
            trainer = make_trainer(config, loop, folder, callbacks, display)
            if not trainer.resume():
                if folder.policy.is_dir():  # exported with every checkpoint
                    raise RloptError(
                        f"{folder.path} has been trained, but its checkpoints are gone; begin a new run (its policy/ "
                        "still works)"
                    )
                log.warning("%s has no checkpoint yet: it begins again at step 0", folder.path)
            for change in folder.version_changes():
                log.warning("%s: this run goes on, but no longer bit for bit", change)
            if loop.step > config.total_steps:
                raise RloptError(
                    f"total_steps={config.total_steps} lies before this run's step {loop.step}; give a larger one"
                )
            folder.write_config(to_dict(config))
        except BaseException:
            loop.close()
            raise
    except BaseException:
        folder.close()
        raise
    return trainer


def _refuse_edits(folder: RunFolder) -> None:
    """Networks, buffers and streams in a checkpoint are those of the configuration it was saved with."""
    if (saved := saved_config(folder.checkpoints)) is None:
        return
    # Both are completed first: a newer rlopt may have options that the older file lacks.
    before, now = (_flat(to_dict(train_config(mapping)), "") for mapping in (parse_config(*saved), folder.config()))
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old != new and name.split(".")[0] not in (*RESUMABLE, "run_dir"):
            raise RloptError(
                f"{folder.config_path} was changed: {name} is {new or 'missing'}, but the run was trained "
                f"{'without it' if old is None else f'with {old}'}; put that back (only total_steps, device, "
                "on_nonfinite and log.… may change), or begin a new run"
            )


def _refuse_dead_rate(folder: RunFolder, config: TrainConfig) -> None:
    """A run that is extended beyond its schedule would learn no more, and nothing would tell."""
    saved, end = saved_config(folder.checkpoints), schedule_end(config)
    before = folder.config() if saved is None else parse_config(*saved)
    if end is None or config.total_steps <= max(end, before.get("total_steps", 0)):
        return
    kind, final = config.agent["lr_schedule"], config.agent["final_learning_rate"]
    if final == 0.0:
        raise RloptError(
            f"total_steps={config.total_steps}: this run's learning rate is 0 from step {end} on "
            f"(agent.lr_schedule={kind}); begin a new run with that many steps, or with agent.lr_schedule=constant"
        )
    log.warning("from step %d on the learning rate stays at %g of what it began with (%s)", end, final, kind)


def _flat(mapping: dict[Any, Any], where: str) -> dict[str, str]:
    """Every leaf as text, under its dotted name."""
    found: dict[str, str] = {}
    for key, value in mapping.items():
        name = join(where, str(key))
        found |= _flat(value, name) if isinstance(value, dict) else {name: str(value)}
    return found


def settle(config: TrainConfig) -> TrainConfig:
    """Decide once what was left open: threads, device, the environment's backend, the length of a schedule, the loss of
    the critics. ``config.yaml`` keeps the answers."""
    agent = dict(config.agent)
    if (end := schedule_end(config)) is not None:
        agent["schedule_steps"] = end
    if agent.get("td_loss") == "auto":
        sampler = get_sampler(config.buffer["name"])
        agent["td_loss"] = getattr(sampler, "td_loss", "squared")
        if agent["td_loss"] == "huber":
            agent["td_threshold"] = config.buffer["floor"]
    threads = auto_threads(config.num_runs) if config.threads == "auto" else config.threads
    env = config.env
    if get_agent(config.agent["name"]).loop != "solver":  # a solver reads a model and steps nothing
        env = replace(env, backend=resolve_backend(env.id, env.backend, kwargs=env.kwargs, wrappers=env.wrappers))
    return replace(config, threads=threads, device=str(resolve_device(config.device)), agent=agent, env=env)


def make_trainer(
    config: TrainConfig, loop: Loop, folder: RunFolder, callbacks: Sequence[Callback] = (), display: Any = None
) -> Trainer:
    """A trainer with this configuration's intervals."""
    return Trainer(
        loop,
        folder,
        eval_every=config.eval.every,
        eval_episodes=config.eval.episodes,
        log_every=config.log.every,
        checkpoint_minutes=config.checkpoint.minutes,
        checkpoint_every=config.checkpoint.every_steps,
        keep=config.checkpoint.keep,
        tensorboard=config.log.tensorboard,
        skip_nonfinite=config.on_nonfinite == "skip",
        policy_meta={"agent": config.agent["name"], "seed": config.seed, "env": to_dict(config.env)},
        callbacks=callbacks,
        display=display,
    )


def make_loop(config: TrainConfig) -> Loop:
    """Environment, agent, buffer and the loop that the agent asks for, from a configuration."""
    load_extensions()
    torch.set_num_threads(auto_threads(config.num_runs) if config.threads == "auto" else int(config.threads))
    return LOOPS[get_agent(config.agent["name"]).loop](config)


def _replay_loop(config: TrainConfig, make: Callable[..., Loop] = ReplayLoop) -> Loop:
    device = resolve_device(config.device)
    runs, rows = config.num_runs, config.num_runs * config.num_envs
    if runs > 1 and (config.env.normalize_obs or config.env.normalize_reward):
        raise RloptError(
            f"num_runs={runs}: statistics of observations or rewards are kept for one run only; leave num_runs out, or "
            "env.normalize_obs and env.normalize_reward"
        )
    env = environment(config, rows, stepping_device(config.env.backend, device), "env", autoreset=True)
    try:
        options = agent_config(config)
        agent = get_agent(config.agent["name"])(
            env.spec, options, seed=config.seed, device=device, runs=runs, precision=config.precision
        )
        buffer_options = buffer_config(config)
        samplers = [get_sampler(buffer_options.name)(**sampler_options(config)) for _ in range(runs)]
        buffer = ReplayBuffer(
            buffer_options.capacity * runs,
            env.spec.observation_space,
            env.spec.action_space,
            num_envs=rows,
            sampler=samplers[0] if runs == 1 else cast(Sampler, RunSamplers(samplers, rows)),
            n_step=options.n_step,
            gamma=options.gamma,
            extra_fields=agent.extra_fields,
            device=_buffer_device(buffer_options.device, device),
            seed=config.seed,
            frame_stack=buffer_options.frame_stack,
            folder=buffer_options.folder,
            batch_device=device,
        )
        normalizer = _normalizer(config, env, options.gamma, device)
        return make(
            agent,
            env,
            buffer,
            config.total_steps,
            evaluator(config, device),
            normalizer,
            config.seed,
            config.overlap,
            _update_mode(config, agent, buffer, normalizer is not None),
        )
    except BaseException:
        env.close()
        raise


def _update_mode(config: TrainConfig, agent: Agent, buffer: ReplayBuffer, normalized: bool) -> str:
    """``captured`` where it was asked for, or on a GPU where nothing stands against it."""
    if config.update_mode == "captured" and not has_graphs(agent.device):
        log.info("update_mode=captured on %s: the same calls as on a GPU, but no graph", agent.device)
    if config.update_mode != "auto":
        return config.update_mode
    if not has_graphs(agent.device):
        return "eager"
    reason = why_not(agent, buffer, normalized)
    if reason is not None:
        log.info("updates are not captured: %s", reason)
    return "eager" if reason else "captured"


def _robust_loop(config: TrainConfig) -> Loop:
    home = stepping_device(config.env.backend, resolve_device(config.device))
    return _replay_loop(
        config, partial(RobustLoop, simulate=lambda n: environment(config, n, home, "adversary", autoreset=False))
    )


def _buffer_device(word: str, agent_device: torch.device) -> torch.device | str:
    if word == "auto":
        return agent_device
    return word if word == "disk" else resolve_device(word)


def _refuse_replay_options(config: TrainConfig) -> None:
    """``num_runs``, ``overlap``, ``precision`` and ``update_mode`` belong to agents that learn from a replay buffer."""
    name, defaults = config.agent["name"], TrainConfig()
    for option in ("num_runs", "overlap", "precision", "update_mode"):
        if (value := getattr(config, option)) != getattr(defaults, option):
            raise RloptError(f"{option}={value}: agent={name} has no such mode; leave {option} out")


def _group_loop(config: TrainConfig) -> Loop:
    device = resolve_device(config.device)
    _refuse_replay_options(config)
    options = agent_config(config)
    rows = options.groups * options.group_size
    if config.num_envs not in (1, rows):
        raise RloptError(
            f"num_envs={config.num_envs}: agent={config.agent['name']} runs agent.groups x agent.group_size = {rows} "
            "environments side by side; change those and leave num_envs out"
        )
    env = environment(config, rows, device, "env", autoreset=False)
    try:
        agent = get_agent(config.agent["name"])(env.spec, options, seed=config.seed, device=device)
        normalizer = _normalizer(config, env, options.gamma, device)
        return GroupLoop(agent, env, config.total_steps, evaluator(config, device), normalizer, config.seed)
    except BaseException:
        env.close()
        raise


def _solver_loop(config: TrainConfig) -> Loop:
    device = resolve_device(config.device)
    _refuse_replay_options(config)
    e = config.env
    if config.num_envs != 1:
        name = config.agent["name"]
        raise RloptError(f"num_envs={config.num_envs}: agent={name} steps no environment; leave num_envs out")
    if e.normalize_obs or e.normalize_reward or e.wrappers:
        raise RloptError(
            f"agent={config.agent['name']} reads the model of the bare environment; leave out env.wrappers, "
            "env.normalize_obs and env.normalize_reward"
        )
    cls = get_agent(config.agent["name"])
    agent = cls(cls.model_of(e.id, e.kwargs), agent_config(config), seed=config.seed, device=device)
    return SolverLoop(agent, config.total_steps, evaluator(config, device))


def _normalizer(config: TrainConfig, env: VectorEnv, gamma: float, device: torch.device) -> Normalizer | None:
    e = config.env
    if not (e.normalize_obs or e.normalize_reward):
        return None
    return Normalizer(env.spec, e.normalize_obs, e.normalize_reward, gamma, device=device)


LOOPS: dict[str, Callable[[TrainConfig], Loop]] = {
    "replay": _replay_loop,
    "robust": _robust_loop,
    "group": _group_loop,
    "solver": _solver_loop,
}


def environment(config: TrainConfig, num_envs: int, device: torch.device, stream: str, autoreset: bool) -> VectorEnv:
    """``num_envs`` copies of the configured environment, with seeds from their own stream."""
    e = config.env
    return make_env(
        e.id,
        num_envs,
        seed=config.seed,
        backend=e.backend,
        device=device,
        autoreset=autoreset,
        kwargs=e.kwargs,
        wrappers=e.wrappers,
        timeout=e.timeout,
        stream=stream,
    )


def evaluator(config: TrainConfig, device: torch.device) -> Evaluator:
    """Evaluation on environments of its own.

    Away from the CPU several runs are evaluated at once, where environments are rows of one simulation: a step there
    costs about the same for one run's rows and for all. On the CPU it would gain little, and its vector instructions
    round a row's sine differently by its place in the batch.
    """
    together = config.num_runs > 1 and device.type != "cpu" and config.env.backend in ("torch", "warp", "native")
    home = stepping_device(config.env.backend, device)
    return Evaluator(lambda n: environment(config, n, home, "evaluation", autoreset=False), config.seed, together)


def auto_threads(runs: int = 1) -> int:
    """Two where this process may use two cores, and one for each of several runs: a third thread gains nothing for one
    run with networks of the usual size (benchmarks/sac_throughput.py)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(max(2, runs), len(allowed))


def describe(trainer: Trainer, config: TrainConfig) -> list[str]:
    """Lines about what is about to run. The size of the replay buffer is not among them: it was logged before the
    buffer was made."""
    size = estimate_bytes(trainer.state_dict(), trainer.loop.row_logs(), config.checkpoint.keep)
    return [f"run folder: {trainer.folder.path}", f"checkpoints: up to {size / 2**30:.2f} GiB on disk"]

"""From a checked configuration to a trainer that is ready to run. The command line and programs both come through
here."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlopt.allocation import memory_told
from rlopt.config import to_dict
from rlopt.loops.base import Loop
from rlopt.loops.configuration import TrainConfig
from rlopt.policy.folder import DESCRIPTION
from rlopt.registry import get_agent, get_loop, load_extensions
from rlopt.runs.checkpoint import estimate_bytes
from rlopt.runs.run_folder import RunFolder, default_run_dir
from rlopt.runs.trackers import refuse_missing
from rlopt.state import CorruptCheckpoint, read_json
from rlopt.training.saved import refuse_dead_rate, resumed_config
from rlopt.training.trainer import SMALLER, Callback, Trainer, UnfitCheckpoint
from rlopt.training.video import films
from rlopt.types import RloptError, resolve_device

log = logging.getLogger(__name__)


def begin(config: TrainConfig, callbacks: Sequence[Callback] = (), display: Any = None) -> Trainer:
    """Return a trainer for a new run in ``config.run_dir``; call ``run`` and then ``close`` on it.

    Raises RloptError where the agent cannot act in the environment, the buffer does not fit, or the folder holds a run.
    """
    config = resolve_config(config)
    refuse_missing(config.log.to)
    with memory_told(SMALLER):
        loop = make_loop(config)
    try:
        callbacks = [*films(config, loop), *callbacks]
        path = Path(config.run_dir or default_run_dir(str(config.agent.name), config.env.id, config.seed))
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
    run: str | Path,
    changes: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    display: Any = None,
    *,
    trust: bool = False,
    env_id: str | None = None,
    without_lost_rows: bool = False,
) -> Trainer:
    """Return a trainer that goes on exactly where the newest sound checkpoint of ``run`` stood.

    ``changes`` are options that may change, nested or dotted: ``total_steps``, ``device``, ``on_nonfinite`` and those
    of ``log``. A run that was not made by this user may name no module unless ``trust`` says so, or ``env_id`` names
    its environment. ``without_lost_rows`` goes on although rows of the replay buffer are lost.

    Raises RloptError where the configuration is not the one that the checkpoints were saved with, where the run would
    outlive its learning rate, where the buffer no longer fits, or where no checkpoint is sound or left. A run that was
    killed before its first checkpoint begins again, with a warning.
    """
    folder = RunFolder.open(Path(run))
    try:
        config = resolve_config(resumed_config(folder, changes, trust=trust, env_id=env_id))
        refuse_missing(config.log.to)
        refuse_dead_rate(folder, config)
        return _continued(config, folder, callbacks, display, without_lost_rows)
    except BaseException:
        folder.close()
        raise


def _continued(
    config: TrainConfig, folder: RunFolder, callbacks: Sequence[Callback], display: Any, without_lost_rows: bool
) -> Trainer:
    """Return a trainer of a loop that stands where the newest checkpoint stood which is sound and fits."""
    unfit: dict[Path, str] = {}
    while True:
        with memory_told(SMALLER):
            loop = make_loop(config)
        try:
            trainer = make_trainer(config, loop, folder, [*films(config, loop), *callbacks], display)
            trainer.checkpoints.unfit = unfit
            try:
                found = trainer.resume(without_lost_rows)
            except UnfitCheckpoint:
                loop.close()  # it holds part of what did not fit
                continue
            if not found:
                if folder.policy.is_dir():  # exported with every checkpoint
                    raise RloptError(
                        f"{folder.path} has been trained, but its checkpoints are gone; begin a new run (its policy/ "
                        "still works)"
                    )
                log.warning("%s has no checkpoint yet: it begins again at step 0", folder.path)
            elif (exported := _exported_step(folder)) > loop.step:
                log.warning(
                    "%s was saved at step %d, but that checkpoint is gone: the run goes on from step %d",
                    folder.path, exported, loop.step,
                )  # fmt: skip
            for change in folder.version_changes():
                log.warning("%s: this run goes on, but no longer bit for bit", change)
            if loop.step > config.total_steps:
                raise RloptError(
                    f"total_steps={config.total_steps} lies before this run's step {loop.step}; give a larger one"
                )
            folder.write_config(to_dict(config))
            return trainer
        except BaseException:
            loop.close()
            raise


def _exported_step(folder: RunFolder) -> int:
    """The step of the policy that was exported with the last checkpoint; -1 where that cannot be told."""
    for path in (folder.policy, folder.policy / "run0"):
        with suppress(CorruptCheckpoint, KeyError, TypeError):
            if type(step := read_json(path / DESCRIPTION)["meta"]["step"]) is int:
                return step
    return -1


def resolve_config(config: TrainConfig) -> TrainConfig:
    """Return ``config`` with everything decided that was left open: threads, the device, and what its loop decides.
    ``config.yaml`` keeps the answers."""
    threads = auto_threads(config.num_runs) if config.threads == "auto" else config.threads
    config = replace(config, threads=threads, device=str(resolve_device(config.device)))
    return loop_class(config).resolve(config)


def make_trainer(
    config: TrainConfig, loop: Loop, folder: RunFolder, callbacks: Sequence[Callback] = (), display: Any = None
) -> Trainer:
    """Return a trainer with this configuration's intervals."""
    return Trainer(
        loop,
        folder,
        eval_every=config.eval.every,
        eval_episodes=config.eval.episodes,
        eval_at_start=config.eval.at_start,
        log_every=config.log.every,
        checkpoint_minutes=config.checkpoint.minutes,
        checkpoint_every=config.checkpoint.every_steps,
        keep=config.checkpoint.keep,
        tensorboard=config.log.tensorboard,
        trackers=config.log.to,
        skip_nonfinite=config.on_nonfinite == "skip",
        policy_meta={
            "agent": config.agent.name,
            "seed": config.seed,
            "env": to_dict(config.env),
            "eval": {"max_steps": config.eval.max_steps},
        },
        callbacks=callbacks,
        display=display,
    )


def make_loop(config: TrainConfig) -> Loop:
    """Return the loop that the agent asks for, with everything in it, from a configuration, resolved or not."""
    load_extensions()
    config = resolve_config(config)
    torch.set_num_threads(int(config.threads))
    return loop_class(config).build(config)


def loop_class(config: TrainConfig) -> type[Loop]:
    """Return the kind of loop that drives the configured agent."""
    found: type[Loop] = get_loop(get_agent(str(config.agent.name)).loop)
    return found


def auto_threads(runs: int = 1) -> int:
    """Return two where this process may use two cores, and one for each of several runs: a third thread gains nothing
    for one run with networks of the usual size (benchmarks/sac_throughput.py)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(max(2, runs), len(allowed))


def describe(trainer: Trainer, config: TrainConfig) -> list[str]:
    """Return lines about what is about to run. The size of the replay buffer is not among them: it was logged before
    the buffer was made."""
    rows = math.ceil(config.total_steps / config.num_envs)
    size = estimate_bytes(trainer.state_dict(), trainer.loop.row_logs(), config.checkpoint.keep, rows)
    return [f"run folder: {trainer.folder.path}", f"checkpoints: up to {size / 2**30:.2f} GiB on disk"]

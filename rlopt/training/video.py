"""Films single episodes. Needs the ``video`` extra (imageio and ffmpeg)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlopt.envs import SyncVectorEnv, VectorEnv, make_env
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.make import find_backend, resolve_backend, stepping_device
from rlopt.loops.base import Loop
from rlopt.loops.configuration import EnvConfig, TrainConfig
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import Player, step_limit
from rlopt.policy import EvaluationMode, Policy
from rlopt.random import derive_seed
from rlopt.training.callback import Callback
from rlopt.types import Episode, RloptError
from rlopt.version import install

if TYPE_CHECKING:
    from rlopt.training.trainer import Trainer

log = logging.getLogger(__name__)


def drawn_environment(env: EnvConfig, seed: int, device: torch.device) -> VectorEnv:
    """Return a vector of one environment that can be filmed; ``env`` is that of evaluations."""
    backend = resolve_backend(env.id, env.backend, kwargs=env.kwargs, wrappers=env.wrappers, facts=env.facts)
    if find_backend(backend).protocols:
        return make_env(
            env.id, 1, seed=seed, backend=backend, device=stepping_device(backend, device), autoreset=False,
            kwargs=env.kwargs, wrappers=env.wrappers, facts=env.facts, timeout=env.timeout,
            stream="evaluation", evaluation=True, protocol=env.protocol,
        )  # fmt: skip
    factory = EnvFactory(find_spec(env.id), {**env.kwargs, "render_mode": "rgb_array"}, env.wrappers, env.facts)
    return SyncVectorEnv([factory], device=device, autoreset=False)


def films(config: TrainConfig, loop: Loop) -> list[Callback]:
    """Return what films a run as ``log.video_every`` says, or nothing.

    Raises:
        RloptError: a package is missing, or the environment cannot be drawn here.
    """
    if config.log.video_every is None:
        return []
    if loop.evaluator is None:
        raise RloptError(f"log.video_every: agent={config.agent.name} has no episodes to film; leave it out")
    check_video(Path("film.mp4"))
    make = partial(drawn_environment, config.env.for_evaluation(), config.seed, loop.policy().device)
    try:
        trial = make()
        try:
            trial.reset()
            _frame(trial)
        finally:
            trial.close()
    except RloptError as e:
        raise RloptError(f"log.video_every: {e}") from e
    return [Films(config.log.video_every, make, config.seed, config.eval.max_steps)]


class Films(Callback):
    """Film the first episode of evaluations (of the first run, where there are several) into ``videos/`` of the run
    folder, and show it in its trackers: of the first evaluation, of those that a multiple of ``every`` steps lies
    before, and of the last one. What fails is told once and ends the filming, not the run."""

    def __init__(self, every: int, make: Callable[[], VectorEnv], seed: int, max_steps: int | None) -> None:
        self.every, self._make, self._seed, self._max_steps = every, make, seed, max_steps
        self._filmed = -1
        """The last step that was looked at for a film."""
        self._failed = False

    def on_start(self, trainer: Trainer) -> None:
        """Go on from where a resumed run stands."""
        self._filmed = trainer.loop.step or -1

    def on_evaluation(self, trainer: Trainer, episodes: list[Episode]) -> None:
        """Film, where it is time."""
        step, loop = trainer.loop.step, trainer.loop
        due = step >= loop.total_steps or step // self.every > self._filmed // self.every
        if self._failed or not due:
            return
        self._filmed = step
        path = trainer.folder.videos / f"step-{step}.mp4"
        try:
            record_episode(loop.policy(), self._make, path, self._seed, loop.evaluation_mode, self._max_steps)
        except Exception as e:  # of a graphics stack, a disk …: training goes on
            log.warning("no film at step %d (%s): there will be none", step, " ".join(str(e).split()))
            self._failed = True
            return
        if trainer.logger is not None:
            trainer.logger.film(step, "eval/video", path)


def record_episode(
    policy: Policy,
    make: Callable[[], VectorEnv],
    path: Path,
    seed: int,
    mode: EvaluationMode | None = None,
    max_steps: int | None = None,
) -> Episode:
    """Film episode 0 of an evaluation with ``seed`` into the mp4 file ``path``.

    ``make`` builds a vector of one environment with ``autoreset=False`` that can be drawn: by its own ``render``, or by
    that of ``envs[0]``, with ``render_mode="rgb_array"``. ``mode`` and ``max_steps`` are those of ``run_episodes``. An
    episode that fails leaves no file.

    Raises:
        RloptError: a missing extra, a path that is no mp4 or cannot be written, or an environment that cannot be drawn.
    """
    open_writer = check_video(path)
    env = make()
    staged = path.with_name(f".{path.stem}.tmp.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fps = float((env.envs[0].metadata.get("render_fps") if isinstance(env, SyncVectorEnv) else 15) or 30)
        with open_writer(str(staged), fps=fps, codec="libx264", macro_block_size=2) as writer:
            try:
                episode = _film(policy, env, writer, seed, mode, max_steps)
            except BaseException:
                writer.close()  # which imageio leaves out after an error: ffmpeg would write the file later
                raise
        staged.replace(path)
    except OSError as e:
        raise RloptError(f"{path} cannot be written: {' '.join(str(e).split())}") from e
    finally:
        staged.unlink(missing_ok=True)
        env.close()
    return episode


def check_video(path: Path) -> Callable[..., Any]:
    """Find imageio's writer of mp4 files, or one clear line before any work is done."""
    if path.suffix != ".mp4":
        raise RloptError(f"video={path}: name a file that ends in .mp4")
    try:
        import imageio
        import imageio_ffmpeg  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as e:
        raise RloptError(f"video needs the package {e.name}; {install('video')}") from e
    writer: Callable[..., Any] = imageio.get_writer
    return writer


def _film(
    policy: Policy, env: VectorEnv, writer: Any, seed: int, mode: EvaluationMode | None, max_steps: int | None
) -> Episode:
    player, limit = Player(policy, seed, mode), step_limit(env.spec, max_steps)
    obs = env.reset(seeds=[derive_seed(seed, "evaluation", 0)])
    counter, carry = EpisodeCounter(env.spec, 1), policy.initial_carry()
    film = _Film(env, writer)
    while True:
        film.shoot()
        act = player.act(obs, carry)
        step = env.step(act.action.to(env.device))
        obs, carry = step.obs, act.carry if step.valid[0] else carry
        found = counter.count(step, act.facts)
        if found or int(counter.lengths) == limit:
            film.shoot()
            return found[0] if found else counter.episode(0)


class _Film:
    """Takes pictures of an environment, all of one size."""

    def __init__(self, env: VectorEnv, writer: Any) -> None:
        self.env, self.writer = env, writer
        self.shape: Any = None

    def shoot(self) -> None:
        frame = _frame(self.env)
        shape = np.shape(frame)
        if self.shape not in (None, shape):
            raise RloptError(
                f"{self.env.spec.id} draws frames of {self.shape}, then of {shape}; a film needs all of one size"
            )
        self.shape = shape
        self.writer.append_data(frame)


def _frame(env: Any) -> Any:
    try:
        frame = (env.envs[0] if isinstance(env, SyncVectorEnv) else env).render()
    except Exception as e:  # renderers raise whatever their graphics stack raises
        said = " ".join(str(e).split()) or type(e).__name__
        hint = "; without a screen MuJoCo draws by EGL (libegl1) or OSMesa (MUJOCO_GL=osmesa)" if "GL" in said else ""
        raise RloptError(f"{env.spec.id} cannot be drawn here: {said}{hint}") from e
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        raise RloptError(f"{env.spec.id} gives no pictures (render_mode rgb_array); leave video out")
    if frame.dtype != np.uint8 or frame.shape[2] not in (3, 4) or 0 in frame.shape:
        raise RloptError(
            f"{env.spec.id} draws frames of {frame.dtype} {frame.shape}; a film needs uint8 (height, width, 3)"
        )
    return frame

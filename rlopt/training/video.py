"""Films one episode. Needs the ``video`` extra (imageio and ffmpeg)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlopt.envs.sync import Env, SyncVectorEnv
from rlopt.loops.episodes import EpisodeCounter
from rlopt.policy import Policy
from rlopt.random import derive_seed, torch_generator
from rlopt.types import Episode, RloptError


def record_episode(
    policy: Policy,
    make: Callable[[], Env],
    path: Path,
    seed: int,
    deterministic: bool = True,
    max_length: int | None = None,
) -> Episode:
    """Film episode 0 of an evaluation with ``seed`` into the mp4 file ``path``.

    ``make`` builds one environment with ``render_mode="rgb_array"``. Where it declares no limit of its own, the film
    ends after ``max_length`` steps. An episode that fails leaves no file.

    Raises:
        RloptError: a missing extra, a path that is no mp4 or cannot be written, or an environment that cannot be drawn.
    """
    open_writer = check_video(path)
    env = SyncVectorEnv([make], device=policy.device, autoreset=False)
    staged = path.with_name(f".{path.stem}.tmp.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fps = float(env.envs[0].metadata.get("render_fps") or 30)
        with open_writer(str(staged), fps=fps, codec="libx264", macro_block_size=2) as writer:
            episode = _film(policy, env, writer, seed, deterministic, max_length)
        staged.replace(path)
    except OSError as e:
        raise RloptError(f"{path} cannot be written: {' '.join(str(e).split())}") from e
    finally:
        staged.unlink(missing_ok=True)
        env.close()
    return episode


def check_video(path: Path) -> Callable[..., Any]:
    """imageio's writer of mp4 files, or one clear line before any work is done."""
    if path.suffix != ".mp4":
        raise RloptError(f"video={path}: name a file that ends in .mp4")
    try:
        import imageio
        import imageio_ffmpeg  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as e:
        raise RloptError(f'video needs the package {e.name}; pip install "rlopt[video]"') from e
    writer: Callable[..., Any] = imageio.get_writer
    return writer


def _film(
    policy: Policy, env: SyncVectorEnv, writer: Any, seed: int, deterministic: bool, max_length: int | None
) -> Episode:
    generator = None if deterministic else torch_generator(seed, "evaluation", "noise", device=policy.device)
    obs = env.reset(seeds=[derive_seed(seed, "evaluation", 0)])
    counter, carry = EpisodeCounter(env.spec, 1), policy.initial_carry()
    while True:
        writer.append_data(_frame(env))
        act = policy.act(obs, carry, deterministic=deterministic, generator=generator)
        step = env.step(act.action)
        obs, carry = step.obs, act.carry
        found = counter.count(step, act.facts)
        cut = env.spec.episode_limit is None and int(counter.lengths) == max_length
        if cut or found:
            writer.append_data(_frame(env))
            return found[0] if found else counter.episode(0)


def _frame(env: SyncVectorEnv) -> Any:
    try:
        frame = env.envs[0].render()
    except Exception as e:  # renderers raise whatever their graphics stack raises
        said = " ".join(str(e).split()) or type(e).__name__
        hint = "; without a screen MuJoCo needs MUJOCO_GL=egl (or osmesa)" if "GL" in said else ""
        raise RloptError(f"{env.spec.id} cannot be drawn here: {said}{hint}") from e
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        raise RloptError(f"{env.spec.id} gives no pictures (render_mode rgb_array); leave video out")
    return frame

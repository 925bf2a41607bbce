"""CleanRL's script as a control: what it is given of today's gymnasium, with a script of its shape."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlopt.analysis.run_results import load_run
from rlopt.analysis.tables import read_csv

SCRIPT = """
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    env_id: str = "nothing"
    seed: int = 9
    total_timesteps: int = 1
    cuda: bool = True


def make_env():
    env = gym.wrappers.RecordEpisodeStatistics(gym.make("Pendulum-v1", max_episode_steps=5))
    env = gym.wrappers.NormalizeObservation(env)
    return gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10))


class Agent:
    actor_mean = torch.nn.Linear(3, 1)


if __name__ == "__main__":
    args = tyro.cli(Args)
    assert (args.env_id, args.total_timesteps, args.cuda) == ("Pendulum-v1", 1_000_000, False)
    agent, writer = Agent(), SummaryWriter("runs/x")
    writer.add_text("text", "text")
    envs = gym.vector.SyncVectorEnv([make_env for i in range(1)])
    envs.reset(seed=args.seed)
    for step in range(1, 100):
        obs, reward, terminated, truncated, infos = envs.step(envs.action_space.sample())
        assert ("final_info" in infos) == bool(truncated[0]) == (step % 5 == 0)
        for info in infos.get("final_info", []):
            if info and "episode" in info:
                writer.add_scalar("charts/episodic_return", info["episode"]["r"], step)
                writer.add_scalar("charts/episodic_length", info["episode"]["l"], step)
        writer.add_scalar("charts/SPS", 1, step)
"""


def test_a_run_folder_of_another_library(
    tmp_path: Path, load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    control = load_script("cleanrl_control")
    monkeypatch.setattr(control, "EVERY", 8)
    monkeypatch.setattr(control, "EPISODES", 2)
    (tmp_path / "cleanrl").mkdir()
    (tmp_path / control.SCRIPT).write_text(SCRIPT)
    folder = tmp_path / "run"
    words = ["experiment=Pendulum-v1", "seed=3", "threads=1", "total_steps=12", f"run_dir={folder}"]
    control.main([*words, f"cleanrl={tmp_path}"])
    assert read_csv(folder / "episodes.csv")["step"] == [5, 10]  # no step is lost to a reset
    assert set(read_csv(folder / "episodes.csv")["length"]) == {5}
    run = load_run(folder)
    assert (run.agent, run.env_id, run.evaluations[0].seed) == ("ppo", "Pendulum-v1", 3)
    assert run.evaluations[0].steps == [8, 12] and [len(e) for e in run.evaluations[0].returns] == [2, 2]
    assert (folder / "policy").is_dir() and "gymnasium" in json.loads((folder / "versions.json").read_text())
    with pytest.raises(SystemExit, match="cannot resume"):
        control.main([f"resume={folder}"])

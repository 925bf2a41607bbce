"""What the replay buffer holds after a training run is what the simulator does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")

import gymnasium

from rlopt.training import train_config
from rlopt.training.setup import begin


@pytest.mark.filterwarnings("ignore:.*out of date.*:DeprecationWarning")
@pytest.mark.parametrize("num_envs", [1, 3])
def test_gymnasium_makes_every_stored_transition_again(num_envs: int, tmp_path: Path) -> None:
    """Hopper observes all of its state but where it stands, so each transition can be simulated anew by itself."""
    config = train_config(
        {
            "seed": 1, "total_steps": 600, "num_envs": num_envs, "threads": 1, "device": "cpu",
            "run_dir": str(tmp_path / "run"), "env": {"id": "Hopper-v4"},
            "agent": {"name": "sac", "network": {"hidden": [16, 16]}, "batch_size": 8, "warmup_steps": 150},
            "eval": {"every": 300, "episodes": 1}, "log": {"every": 300, "tensorboard": False},
        }
    )  # fmt: skip
    trainer = begin(config)
    try:
        trainer.run()
        buffer = trainer.loop.buffer
        held = buffer.batch(torch.arange(len(buffer)))
    finally:
        trainer.close()
        trainer.folder.close()
    assert len(buffer) == 600
    obs, next_obs, action = (x.numpy() for x in (held.obs, held.next_obs, held.action))
    reset = buffer.block.view(-1, buffer.layout.width)[:600, buffer.slices["ended"].start] != 0
    goes_on = np.flatnonzero(~reset.numpy()[:-num_envs])
    assert (obs[goes_on + num_envs] == next_obs[goes_on]).all()
    assert held.terminated.sum() > 5 and np.array_equal(held.terminated.bool(), reset)

    env = gymnasium.make("Hopper-v4").unwrapped
    env.reset(seed=0)
    checked = 0
    for i in range(600):
        if np.abs(obs[i, 5:]).max() < 10.0:  # observed velocities are clipped there
            env.set_state(np.concatenate(([0.0], obs[i, :5])), obs[i, 5:])
            found, reward, terminated, _, _ = env.step(action[i])
            assert found == pytest.approx(next_obs[i], abs=1e-3)
            assert reward == pytest.approx(float(held.reward[i]), abs=1e-3)
            assert terminated == bool(held.terminated[i])
            checked += 1
    assert checked > 550

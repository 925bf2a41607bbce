"""TorchRL's double DQN on CartPole, its replay buffer drawn by random reshuffling (or, with --prioritized, by RR-M).

pip install -c constraints.txt -e ".[torchrl]"
"""

from __future__ import annotations

import argparse

import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, set_exploration_type
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from rlopt.buffers.interop.torchrl import PrioritizedReshuffledSampler, ReshuffledSampler


def main(steps: int = 10_000, prioritized: bool = False) -> float:
    torch.manual_seed(0)
    env = GymEnv("CartPole-v1")
    env.set_seed(0)
    actor = QValueActor(MLP(in_features=4, out_features=2, num_cells=[128, 128]), spec=env.action_spec)
    explorer = EGreedyModule(env.action_spec, eps_end=0.05, annealing_num_steps=steps // 4)
    collector = Collector(
        env, TensorDictSequential(actor, explorer), frames_per_batch=10, total_frames=steps, init_random_frames=500
    )
    sampler = PrioritizedReshuffledSampler() if prioritized else ReshuffledSampler()  # the one line
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(steps), sampler=sampler, batch_size=128)
    loss_module = DQNLoss(actor, action_space=env.action_spec, double_dqn=True)
    loss_module.make_value_estimator(gamma=0.99)
    target, optimizer = SoftUpdate(loss_module, tau=0.01), torch.optim.Adam(loss_module.parameters(), 1e-3)
    for data in collector:
        buffer.extend(data.reshape(-1))
        explorer.step(data.numel())
        for _ in range(data.numel() // 2 if len(buffer) > 500 else 0):
            batch = buffer.sample()
            loss_module(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            target.step()
            buffer.update_tensordict_priority(batch)
    collector.shutdown()
    with torch.no_grad(), set_exploration_type("DETERMINISTIC"):
        returns = [float(env.rollout(500, actor)["next", "reward"].sum()) for _ in range(10)]
    mean = sum(returns) / len(returns)
    print(f"mean return {mean:.1f} over 10 episodes after {steps} steps with {sampler}")
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--prioritized", action="store_true")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.prioritized)

"""Agents: one algorithm, one file, read from top to bottom like its paper; each is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlopt.agents.actor_critic import ActorCritic, ActorCriticConfig
from rlopt.agents.anchors import register_anchor
from rlopt.agents.base import Agent, AgentConfig, ReplayAgentConfig
from rlopt.agents.replay_agent import ReplayAgent
from rlopt.agents.temperature import Temperature, TemperatureConfig
from rlopt.agents.value_based import ValueBased, ValueBasedConfig

if TYPE_CHECKING:
    from rlopt.agents.dqn import DQN, DQNConfig
    from rlopt.agents.gigpo import GiGPO, GiGPOConfig
    from rlopt.agents.ppo import PPO, PPOConfig
    from rlopt.agents.sac import SAC, SACConfig
    from rlopt.agents.sac_2018 import SAC2018, SAC2018Config
    from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig
    from rlopt.agents.td3 import TD3, TD3Config
    from rlopt.agents.teams.hasac import HASAC, HASACConfig

__all__ = [
    "DQN",
    "HASAC",
    "PPO",
    "SAC",
    "SAC2018",
    "TD3",
    "ActorCritic",
    "ActorCriticConfig",
    "Agent",
    "AgentConfig",
    "DQNConfig",
    "DiscreteSAC",
    "DiscreteSACConfig",
    "GiGPO",
    "GiGPOConfig",
    "HASACConfig",
    "PPOConfig",
    "ReplayAgent",
    "ReplayAgentConfig",
    "SAC2018Config",
    "SACConfig",
    "TD3Config",
    "Temperature",
    "TemperatureConfig",
    "ValueBased",
    "ValueBasedConfig",
    "register_anchor",
]

_HOMES = {
    "DQN": "dqn", "DQNConfig": "dqn",
    "GiGPO": "gigpo", "GiGPOConfig": "gigpo",
    "PPO": "ppo", "PPOConfig": "ppo",
    "SAC": "sac", "SACConfig": "sac", "SAC2018": "sac_2018", "SAC2018Config": "sac_2018",
    "DiscreteSAC": "sac_discrete", "DiscreteSACConfig": "sac_discrete",
    "TD3": "td3", "TD3Config": "td3",
    "HASAC": "teams.hasac", "HASACConfig": "teams.hasac",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlopt.agents' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlopt.agents.{_HOMES[name]}"), name)

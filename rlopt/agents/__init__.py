"""Agents: one algorithm, one file, read from top to bottom like its paper."""

from rlopt.agents.actor_critic import ActorCritic, ActorCriticConfig
from rlopt.agents.base import Agent, AgentConfig, ReplayAgentConfig
from rlopt.agents.replay_agent import ReplayAgent
from rlopt.agents.sac import SAC, SACConfig
from rlopt.agents.sac_2018 import SAC2018, SAC2018Config
from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig
from rlopt.agents.td3 import TD3, TD3Config
from rlopt.agents.temperature import Temperature, TemperatureConfig

__all__ = [
    "SAC",
    "SAC2018",
    "TD3",
    "ActorCritic",
    "ActorCriticConfig",
    "Agent",
    "AgentConfig",
    "DiscreteSAC",
    "DiscreteSACConfig",
    "ReplayAgent",
    "ReplayAgentConfig",
    "SAC2018Config",
    "SACConfig",
    "TD3Config",
    "Temperature",
    "TemperatureConfig",
]

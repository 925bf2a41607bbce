"""Agents: one algorithm, one file, read from top to bottom like its paper."""

from rlopt.agents.base import Agent, AgentConfig, ReplayAgentConfig
from rlopt.agents.replay_agent import OffPolicyActorCritic
from rlopt.agents.sac import SAC, SACConfig
from rlopt.agents.sac_2018 import SAC2018, SAC2018Config
from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig

__all__ = [
    "SAC",
    "SAC2018",
    "Agent",
    "AgentConfig",
    "DiscreteSAC",
    "DiscreteSACConfig",
    "OffPolicyActorCritic",
    "ReplayAgentConfig",
    "SAC2018Config",
    "SACConfig",
]

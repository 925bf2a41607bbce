"""Agents: one algorithm, one file, read from top to bottom like its paper."""

from rlopt.agents.base import Agent, AgentConfig, ReplayAgentConfig
from rlopt.agents.sac import SAC, SACConfig

__all__ = ["SAC", "Agent", "AgentConfig", "ReplayAgentConfig", "SACConfig"]

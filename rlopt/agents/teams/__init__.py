"""Agents that train several agents at once: sequential updates and what they are compared with."""

"""Exported policies: one folder each, loaded without running any code of theirs."""

from rlopt.policy.exported import EvaluationMode, Policy
from rlopt.policy.folder import find_policy, load_policy, run_policies, save_policy

__all__ = ["EvaluationMode", "Policy", "find_policy", "load_policy", "run_policies", "save_policy"]

"""Text environments: what one is stands in ``rlopt.envs.text.game``."""

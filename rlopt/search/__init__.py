"""Searching options: spaces, trials of several seeds on Optuna, and what they came to."""

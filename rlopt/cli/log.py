"""What is logged before long work, shown where a command was typed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHOWN = (
    "agents.base",
    "agents.gigpo_llm",
    "buffers.replay",
    "envs.atari.env",
    "envs.make",
    "envs.warp",
    "fast.fused_ppo",
    "fast.fused_sac",
    "loops.base",
    "loops.evaluation",
    "loops.replay",
    "loops.solver",
    "loops.text",
    "loops.text_play",
    "nn.networks",
)


@contextmanager
def log_shown(show: Callable[[str], object]) -> Iterator[None]:
    """Show what is logged before or during long work: a game's protocol, the planned size of the replay buffer, what a
    language model takes, why updates are not captured, what is compiled (known at the first update only), how far a
    long evaluation is."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    handler = Handler(logging.INFO)
    loggers = [logging.getLogger(f"rlopt.{name}") for name in _SHOWN]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)

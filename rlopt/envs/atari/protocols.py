"""What an Atari score depends on beside the agent: two protocols, which published numbers must never be mixed of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gymnasium.envs.registration import EnvSpec as GymSpec

from rlopt.config import hint
from rlopt.types import RloptError


@dataclass(frozen=True)
class Protocol:
    """How a game is begun, played and paid for. Both show the last four grey frames of 84 x 84, each the brighter of
    the last two of four emulator frames in which one action is held, and end a game after 108,000 emulator frames."""

    name: str
    sticky: float
    """Probability that the emulator repeats its last action instead of the given one, in each frame."""
    noops: int
    """A game begins with 0 to so many frames without action."""
    lives: bool
    """Whether a lost life is an end for learning, after which the game goes on with hidden steps: NOOP, and FIRE and
    the action after it where the game has FIRE, which also begin a game. The stack of frames begins anew there."""
    padding: Literal["repeat", "zero"]
    """What fills a new stack: copies of its first frame, or zeros."""
    reward: str
    """What learners make of a reward by default (``agent.reward``)."""
    says: str
    """The above, in words."""


CLASSIC = Protocol(
    "classic", 0.0, 30, True, "repeat", "sign", "no sticky actions, no-op starts, lost lives end for learning, signs"
)
"""Of the DQN of 2015 as CleanRL, Tianshou, Stable-Baselines3 and EnvPool have it."""
DOPAMINE = Protocol(
    "dopamine", 0.25, 0, False, "zero", "clip", "sticky actions of 0.25, whole games, rewards clipped to [-1, 1]"
)
"""Machado et al. 2018 (arXiv 1709.06009), as Dopamine has it."""
PROTOCOLS = {p.name: p for p in (CLASSIC, DOPAMINE)}

OPTIONS = {
    "full_action_space": bool,
    "repeat_action_probability": float,
    "noop_max": int,
    "max_num_frames_per_episode": int,
    "max_episode_steps": int,
    "frameskip": int,
    "stack_num": int,
    "img_height": int,
    "img_width": int,
}
"""Entries of ``env.kwargs`` that change a protocol's single numbers, and their types."""
RAW = "env.backend=sync plays the game as Gymnasium does, in raw frames without a protocol"
"""What there is for whom ``refusal`` refuses."""
_DECIDED = ("episodic_life", "life_loss_info", "reward_clipping", "use_fire_reset")


def is_atari(spec: GymSpec) -> bool:
    """Return whether an id is one of a whole game without preprocessing: ``ALE/Name-v5`` or ``NameNoFrameskip-v4``."""
    return spec.entry_point == "ale_py.env:AtariEnv" and isinstance(spec.kwargs.get("frameskip"), int)


def refusal(spec: GymSpec, kwargs: Mapping[str, Any], wrapped: bool, facts: bool = False) -> str | None:
    """Return why the backend ``atari`` is not for what is asked; None where it is."""
    if not is_atari(spec):
        return f"env={spec.id} is no Atari game (ALE/Name-v5)"
    if wrapped:
        return "a protocol brings its own preprocessing; leave env.wrappers out, or env.protocol"
    if facts:
        return "env.facts are read from info, which backend=atari leaves out"
    for key in kwargs:
        if key in _DECIDED:
            return f"env.kwargs.{key} is what env.protocol decides; choose one of {', '.join(PROTOCOLS)}"
        if key not in OPTIONS:
            return f"env.kwargs.{key} is none of the backend atari; {hint(key, list(OPTIONS))}"
    return None


def protocol_of(spec: GymSpec, word: str | None) -> Protocol:
    """Return the protocol called ``word``; by default that of the id: ``dopamine`` where it registers sticky actions
    (``ALE/Name-v5``), else ``classic``.

    Raises:
        RloptError: there is none of that name.
    """
    if word is None:
        return DOPAMINE if spec.kwargs.get("repeat_action_probability") else CLASSIC
    if word not in PROTOCOLS:
        raise RloptError(f"env.protocol={word!r} is unknown; {hint(str(word), list(PROTOCOLS))}")
    return PROTOCOLS[word]

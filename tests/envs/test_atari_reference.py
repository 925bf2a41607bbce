"""``env.protocol=classic`` is the old stack of wrappers: Gymnasium's preprocessing, and lives and FIRE as
Stable-Baselines3 has them (the code of OpenAI Baselines, as in CleanRL), given the no-ops that were drawn.

Named differences: a game begins with 0 to 30 no-ops instead of 1 to 30; what hidden steps earn is added to the next
reward, where the wrappers' learner never sees it; the last frame of a game that is over within a step (which no target
reads) may be the one before.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from rlopt.envs import make_env

pytest.importorskip("ale_py.vector_env")
wrappers = pytest.importorskip("stable_baselines3.common.atari_wrappers")


class _Recorded:
    """An emulator that writes down what it is told."""

    def __init__(self, ale: Any) -> None:
        self.ale, self.acts = ale, list[list[int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ale, name)

    def act(self, action: Any, *strength: float) -> Any:
        self.acts[-1].append(action.value)
        return self.ale.act(action, *strength)

    def reset_game(self) -> None:
        self.acts.append([])
        self.ale.reset_game()


class _Noops(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Begins each game with so many frames without action."""

    count = 0

    def reset(self, **kwargs: Any) -> Any:
        found = self.env.reset(**kwargs)
        for _ in range(self.count):
            found = self.env.step(0)[0], {}
        return found


class _Earned(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds up what the game pays, hidden steps included."""

    total = 0.0

    def step(self, action: Any) -> Any:
        found = self.env.step(action)
        self.total += float(found[1])
        return found


def _reference(game: str, limit: int) -> Any:
    raw = gymnasium.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0, disable_env_checker=True)
    raw.unwrapped.ale = _Recorded(raw.unwrapped.ale)  # type: ignore[attr-defined]
    noops = _Noops(raw)
    whole = gymnasium.wrappers.TimeLimit(AtariPreprocessing(noops, noop_max=0), limit)
    earned = _Earned(whole)
    fired: Any = wrappers.EpisodicLifeEnv(earned)
    if "FIRE" in raw.unwrapped.get_action_meanings():  # type: ignore[attr-defined]
        fired = wrappers.FireResetEnv(fired)
    return FrameStackObservation(fired, 4, padding_type="reset"), noops, earned, raw.unwrapped.ale  # type: ignore[attr-defined]


def _alike(ours: Any, theirs: Any) -> bool:
    """ale-py's own tests allow 25 pixels of 2 at most."""
    off = np.abs(ours.astype(int) - theirs.astype(int))
    return int((off > 0).sum()) <= 25 and int(off.max()) <= 2


GAMES = [("Breakout", 260, 27_000), ("SpaceInvaders", 260, 27_000), ("Seaquest", 220, 27_000), ("Qbert", 260, 27_000),
         ("Pong", 150, 60), ("Asterix", 160, 27_000)]  # fmt: skip
"""Games with lives and FIRE, with FIRE alone, and with lives alone; steps, and steps after which a game is cut off."""


@pytest.mark.parametrize(("game", "steps", "limit"), GAMES)
def test_classic_is_the_old_stack_of_wrappers(game: str, steps: int, limit: int) -> None:
    env: Any = make_env(f"ALE/{game}-v5", 1, seed=5, protocol="classic", kwargs={"max_episode_steps": limit})
    theirs, noops, earned, ale = _reference(game, limit)
    choice = torch.Generator().manual_seed(1)
    obs: Any = env.reset()
    expected: Any = None
    begun, ends, lives, hidden = [int(env.noops[0])], list[int](), [int(env.lives[0])], 0
    total, needs_reset = 0.0, True
    for _ in range(steps):
        action = torch.randint(int(env.spec.action_space.n), (1,), generator=choice)
        if needs_reset and not env.hidden[0]:
            noops.count = begun[-1]
            expected, _ = theirs.reset()
            assert _alike(obs[0].numpy(), np.asarray(expected)), "the stack that a life begins with"
            needs_reset = False
        step = env.step(action)
        obs = step.obs
        if not step.valid[0]:
            hidden += 1
            continue
        expected, _, terminated, truncated, _ = theirs.step(int(action))
        needs_reset = terminated or truncated
        assert (bool(step.terminated[0]), bool(step.truncated[0])) == (terminated, truncated)
        total += float(step.reward[0])
        assert total == earned.total
        if step.ended[0]:
            ends.append(len(_played(env)))
            begun.append(int(env.noops[0]))
        else:
            assert int(env.lives[0]) == theirs.unwrapped.ale.lives()
            lives.append(int(env.lives[0]))
        if not (step.ended[0] and terminated):
            assert _alike(step.next_obs[0].numpy(), np.asarray(expected))
    assert needs_reset or hidden, "something happened"
    assert len(ends) == {"Breakout": 1, "Pong": 2}.get(game, 0) and (game == "Pong" or len(set(lives)) > 1)

    # What the emulator was told, frame by frame, game by game.
    codes, played = [action.value for action in env._env.ale.get_action_set()], _played(env)
    for k, (first, last) in enumerate(zip([0, *ends], [*ends, len(played)], strict=True)):
        ours = [0] * begun[k] + [codes[a] for a in played[first:last] for _ in range(4)]
        told = [acts for acts in ale.acts if acts][k]
        assert told == ours[: len(told)]
        assert len(ours) - len(told) <= (3 if k < len(ends) else 12)  # a game over within a step; steps still hidden
    env.close()


def _played(env: Any) -> list[int]:
    return [action % 128 for action in env.state_dict()["played"][0].tolist()]

"""StarCraft II micromanagement, SMAC (Samvelyan et al. 2019, arXiv 1902.04043) and SMACv2 (Ellis et al. 2023, arXiv
2212.07489), as one Gymnasium environment of a team. Neither the packages nor the game come with rlopt."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlopt.envs.arrays import Array
from rlopt.joint import join_spaces
from rlopt.types import RloptError, binary

GAMES = {"smac": "smac.env:StarCraft2Env", "smacv2": "smacv2.env.starcraft2.wrapper:StarCraftCapabilityEnvWrapper"}
"""Namespace of names, and the class that plays it."""
SOURCE = {"smac": "https://github.com/oxwhirl/smac", "smacv2": "https://github.com/oxwhirl/smacv2"}
HOME = "~/StarCraftII"
"""Where the game is looked for unless SC2PATH says otherwise."""
_V2 = {
    "terran": (["marine", "marauder", "medivac"], [0.45, 0.45, 0.1]),
    "protoss": (["stalker", "zealot", "colossus"], [0.45, 0.45, 0.1]),
    "zerg": (["zergling", "hydralisk", "baneling"], [0.45, 0.45, 0.1]),
}
"""Races: their units and how often each is drawn, as SMACv2's published configurations have it."""
_NO_OP = 0
"""All that a dead unit may do, and may not while it lives."""


class SmacEnv(gymnasium.Env[Any, Any]):
    """A team of units, each with ``obs``, what it can do now (``action_mask``), and whether it is ``alive``; the state
    is the game's. One reward for the team. The fact ``won`` is 1 where the battle was.

    The battle's time limit is one (``truncated``): the game says that it is over, and its info that the episode's limit
    was reached.

    Args:
        game: ``smac`` or ``smacv2``.
        map_name: SMAC's ``3m``, ``MMM2`` …; SMACv2's race and numbers, ``terran_5_vs_5``.
        kwargs: of the game's own class.

    Raises:
        RloptError: the package or the game is not installed, or there is no such map.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(self, game: str, map_name: str, render_mode: str | None = None, **kwargs: Any) -> None:
        self.render_mode = render_mode
        self.game: Any = self._make(game, map_name, kwargs)
        facts = self.game.get_env_info()
        n, k = int(facts["n_agents"]), int(facts["n_actions"])
        one = spaces.Dict({
            "obs": spaces.Box(-np.inf, np.inf, (int(facts["obs_shape"]),), np.float32), "action_mask": binary((k,)),
        })  # fmt: skip
        own = [(one, spaces.Discrete(k))] * n
        state = spaces.Box(-np.inf, np.inf, (int(facts["state_shape"]),), np.float32)
        self.observation_space, self.action_space = join_spaces(own, state, alive=True)
        agents = tuple(f"unit_{i}" for i in range(n))
        self.metadata = {**self.metadata, "agents": agents, "agent_spaces": own, "facts": ("won",)}

    @staticmethod
    def _make(game: str, map_name: str, kwargs: Mapping[str, Any]) -> Any:
        module, _, name = GAMES[game].partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as e:
            trap = " (the package smac of PyPI is another one)" if game == "smac" else ""
            raise RloptError(f"env={game}/{map_name}: pip install git+{SOURCE[game]}{trap}") from e
        home = Path(os.environ.get("SC2PATH", HOME)).expanduser()
        if not home.is_dir():
            raise RloptError(
                f"env={game}/{map_name}: StarCraft II is not at {home}; install it (Blizzard/s2client-proto) with the "
                "maps, or say in SC2PATH where it is"
            )
        options = {"map_name": map_name} if game == "smac" else _capabilities(map_name)
        try:
            return cls(**{**options, **kwargs})
        except (KeyError, ValueError, AssertionError) as e:
            raise RloptError(f"env={game}/{map_name}: the game does not take it: {type(e).__name__} {e}") from e

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a battle. The game seeds itself when it starts, so that a ``seed`` is set for its next start."""
        super().reset(seed=seed)
        if seed is not None:
            inner = getattr(self.game, "env", self.game)
            inner._seed = seed
        self.game.reset()
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        possible = np.asarray(self.game.get_avail_actions())
        given = np.asarray(action, np.int64)
        # A dead unit's action goes nowhere; the game wants its no-op.
        dead = possible[:, _NO_OP].astype(bool)
        reward, over, info = self.game.step(np.where(dead, _NO_OP, given).tolist())
        late = bool(over) and bool(info.get("episode_limit", False))
        facts = {"won": float(bool(info.get("battle_won", False)))} if over else {}
        return self._seen(), float(reward), bool(over) and not late, late, facts

    def _seen(self) -> dict[str, Array]:
        possible = np.asarray(self.game.get_avail_actions(), np.int8)
        return {
            "obs": np.asarray(self.game.get_obs(), np.float32),
            "action_mask": possible,
            "state": np.asarray(self.game.get_state(), np.float32).reshape(-1),
            "alive": 1 - possible[:, _NO_OP],
        }

    def render(self) -> Any:
        return self.game.render(mode="rgb_array")

    def close(self) -> None:
        self.game.close()


def _capabilities(name: str) -> dict[str, Any]:
    """Return SMACv2's configuration of ``<race>_<units>_vs_<enemies>``, as its published ones are."""
    race, *numbers = name.split("_")
    if race not in _V2 or len(numbers) != 3 or numbers[1] != "vs" or not (numbers[0] + numbers[2]).isdigit():
        raise RloptError(f"env=smacv2/{name}: write RACE_UNITS_vs_ENEMIES, as smacv2/terran_5_vs_5; {', '.join(_V2)}")
    units, weights = _V2[race]
    own, enemies = int(numbers[0]), int(numbers[2])
    return {
        "map_name": f"10gen_{race}",
        "capability_config": {
            "n_units": own, "n_enemies": enemies,
            "team_gen": {
                "dist_type": "weighted_teams", "unit_types": units, "weights": weights, "observe": True,
                "exception_unit_types": units[2:] if race != "protoss" else [],
            },
            "start_positions": {
                "dist_type": "surrounded_and_reflect", "p": 0.5, "n_enemies": enemies, "map_x": 32, "map_y": 32,
            },
        },
        "conic_fov": False, "use_unit_ranges": True, "min_attack_range": 2, "num_fov_actions": 12,
        "obs_own_pos": True, "fully_observable": False,
    }  # fmt: skip

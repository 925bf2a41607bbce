"""Registers the environments that come with rlopt; Gymnasium imports one when it is made."""

from __future__ import annotations

import gymnasium

from rlopt.env_names import OWN, TEXT_GAME, TEXT_GAMES
from rlopt.envs.teams.names import team_spec
from rlopt.registry import TEAMS

for _game in TEXT_GAMES:
    if f"textworld_express/{_game}" not in gymnasium.registry:
        gymnasium.register(f"textworld_express/{_game}", entry_point=TEXT_GAME, kwargs={"game": _game})

for _id, _entry_point in OWN.items():
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_entry_point)

for _id in TEAMS:
    if _id not in gymnasium.registry and (_spec := team_spec(_id)) is not None:
        gymnasium.registry[_id] = _spec

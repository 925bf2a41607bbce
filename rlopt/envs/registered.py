"""The environments that come with rlopt, by name; Gymnasium imports one when it is made."""

from __future__ import annotations

import gymnasium

from rlopt.envs.teams.names import team_spec
from rlopt.registry import TEAMS

OWN = {
    "Garnet-v0": "rlopt.robust.problems.environments:GarnetEnv",
    "MachineReplacement-v0": "rlopt.robust.problems.environments:MachineReplacementEnv",
    "RiverSwim-v0": "rlopt.robust.problems.environments:RiverSwimEnv",
    "GridWorld-v0": "rlopt.robust.problems.environments:GridWorldEnv",
    "Inventory-v0": "rlopt.robust.problems.environments:InventoryEnv",
    "alfworld": "rlopt.envs.text.alfworld:ALFWorldEnv",
    "textworld": "rlopt.envs.text.textworld:TextWorldEnv",
}

TEXT_GAMES = ("cookingworld", "twc", "coin", "mapreader", "arithmetic", "sorting", "simonsays", "peckingorder")

for _game in TEXT_GAMES:
    if f"textworld_express/{_game}" not in gymnasium.registry:
        gymnasium.register(
            f"textworld_express/{_game}",
            entry_point="rlopt.envs.text.textworld_express:TextWorldExpressEnv",
            kwargs={"game": _game},
        )

for _id, _entry_point in OWN.items():
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_entry_point)

for _id in TEAMS:
    if _id not in gymnasium.registry and (_spec := team_spec(_id)) is not None:
        gymnasium.registry[_id] = _spec

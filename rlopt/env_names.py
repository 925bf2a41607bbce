"""Names of environments, told without torch: which there are, and what an unknown one was most likely meant to be."""

from __future__ import annotations

import contextlib
import re

from rlopt.config import nearest
from rlopt.registry import TEAMS, register_games
from rlopt.version import install

OWN = {
    "Garnet-v0": "rlopt.robust.problems.environments:GarnetEnv",
    "MachineReplacement-v0": "rlopt.robust.problems.environments:MachineReplacementEnv",
    "RiverSwim-v0": "rlopt.robust.problems.environments:RiverSwimEnv",
    "GridWorld-v0": "rlopt.robust.problems.environments:GridWorldEnv",
    "Inventory-v0": "rlopt.robust.problems.environments:InventoryEnv",
    "alfworld": "rlopt.envs.text.alfworld:ALFWorldEnv",
    "textworld": "rlopt.envs.text.textworld:TextWorldEnv",
}
"""The environments that come with rlopt, each with its class, beside teams and text games."""
TEXT_GAMES = ("cookingworld", "twc", "coin", "mapreader", "arithmetic", "sorting", "simonsays", "peckingorder")
"""Those of TextWorld-Express, ``textworld_express/coin`` and so on."""
TEXT_GAME = "rlopt.envs.text.textworld_express:TextWorldExpressEnv"
ELSEWHERE = {
    "gymnasium_robotics": ("Fetch", "Hand", "PointMaze_", "AntMaze_", "Adroit", "FrankaKitchen"),
    "panda_gym": ("Panda",),
    "highway_env": ("highway-", "merge-", "roundabout-", "parking-", "intersection-", "racetrack-"),
    "mo_gymnasium": ("mo-", "deep-sea-treasure", "minecart-"),
    "shimmy": ("dm_control/", "bsuite/"),
}
"""Well-known packages, and how the names begin that they register with Gymnasium once they are imported."""
EXTRAS = {
    "mujoco": "mujoco", "imageio": "mujoco", "ale_py": "atari", "minatar": "minatar", "shimmy": "atari",
    "gymnasium_robotics": "marl", "pettingzoo": "marl", "mpe2": "marl", "lbforaging": "marl", "minigrid": "text",
}  # fmt: skip
"""Packages that environments need, and the extra that brings them."""


def known() -> dict[str, str]:
    """Return every name that is registered, with its class as ``module:Class`` where that is told by text."""
    import gymnasium

    registered = {id: spec.entry_point for id, spec in gymnasium.registry.items()}
    told = {id: entry if isinstance(entry, str) else "" for id, entry in registered.items()}
    teams = {id: "" for id in TEAMS if not id.startswith("pettingzoo:")}
    games = {f"textworld_express/{game}": TEXT_GAME for game in TEXT_GAMES}
    return {**teams, **told, **OWN, **games}


def in_namespace(name: str) -> bool:
    """Return whether ``name`` is, or is meant to be, a task of a team's, of which there are more than are listed."""
    return "/" in name and name.partition("/")[0] in {id.partition("/")[0] for id in TEAMS if "/" in id}


def unknown(name: str) -> str:
    """Return what is to be said of a ``name`` that is not known."""
    with contextlib.suppress(ImportError):
        register_games("ALE/")
    names = known()
    stem, _, version = name.rpartition("-v")
    if not stem and (versions := [s for s in names if s.rpartition("-v")[0] == name]):
        return f"lacks its version; did you mean {max(versions, key=_version)}?"
    lost = "is not a registered environment"
    if re.fullmatch(r"\w+_v\d+", name.rpartition("/")[2].rpartition(".")[2]):
        return (
            f"{lost}; it looks like one of PettingZoo: write env=pettingzoo:MODULE for the module that has its "
            "parallel_env, as pettingzoo:mpe2.simple_spread_v3"
        )
    stems: dict[str, list[str]] = {}
    for one in names:  # names are compared without versions and namespaces, which many share
        for short in {one.rpartition("-v")[0], one.rpartition("-v")[0].rpartition("/")[2]}:
            stems.setdefault(short, []).append(one)
    if (near := nearest(stem or name, stems)) is not None:
        same = [one for one in stems[near] if one.endswith(f"-v{version}")]
        return f"{lost}; did you mean {(same or sorted(stems[near], key=_version))[-1]}?"
    for package, beginnings in ELSEWHERE.items():
        if name.startswith(beginnings):
            there = f"write env={package}:{name} once it is installed ({installs(package)})"
            return f"{lost} here; the package {package} has such names: {there}"
    return f"{lost}; `rlopt list envs` shows what there is, and module:Name-v0 is one that a module of yours registers"


def installs(package: str) -> str:
    """Return what installs a package that an environment needs."""
    return install(EXTRAS[package]) if package in EXTRAS else f"pip install {package.replace('_', '-')}"


def _version(env_id: str) -> int:
    version = env_id.rpartition("-v")[2]
    return int(version) if version.isdecimal() else -1

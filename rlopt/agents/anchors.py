"""What makes two steps of a task act in the same state, for advantages relative to it (GiGPO): keys of observations."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rlopt.agents.group_advantages import anchor_groups
from rlopt.config import hint
from rlopt.envs.text.game import Seen
from rlopt.types import Obs, RloptError

AnchorKey = Callable[[Any, Mapping[str, Any], Sequence[tuple[Any, Any]]], Hashable]
"""``(observation, info, history) -> key``: what was acted on, an array or a dict of arrays (of text environments a
str), what the environment said beside it (facts by name, as floats: those of its metadata and of ``env.facts``; none
with a first observation), and the (observation, action) pairs before it in the episode, newest last."""


def _state(observation: Any, info: Mapping[str, Any], history: Sequence[tuple[Any, Any]]) -> Hashable:
    if isinstance(observation, str):
        return str(info["state"])
    if not isinstance(observation, dict) or "state" not in observation:
        raise RloptError("agent.anchor=state: observations have no leaf state; leave it out")
    return np.asarray(observation["state"]).tobytes()


def _exact(observation: Any, info: Mapping[str, Any], history: Sequence[tuple[Any, Any]]) -> Hashable:
    if isinstance(observation, str):
        return str(info["exact"])
    if not isinstance(observation, dict) or "exact" not in observation:
        raise RloptError(
            "agent.anchor=exact: observations have no leaf exact; add env.wrappers=[rlopt.envs.exact:ExactState]"
        )
    return np.asarray(observation["exact"]).tobytes()


def _admissible(observation: Any, info: Mapping[str, Any], history: Sequence[tuple[Any, Any]]) -> Hashable:
    if not isinstance(observation, str):
        raise RloptError("agent.anchor=admissible is of language models; an observation of choices holds them already")
    return observation, info["admissible"]


KEYS: dict[str, AnchorKey] = {"state": _state, "exact": _exact, "admissible": _admissible}
"""Functions by name, beside ``observation``, which is all that is observed (of choices in text games the state with the
actions offered there, of language models the game's last words); ``state`` and ``exact`` are its leaves of those names,
of language models what the game says of itself; ``admissible`` is its words with the actions offered."""


def register_anchor(name: str, key: AnchorKey) -> None:
    """Let ``agent.anchor=NAME`` compare steps by ``key``. A module that ``env=MODULE:…`` imports is a good place.

    Raises:
        RloptError: the name is taken.
    """
    if name == "observation" or KEYS.get(name, key) is not key:
        raise RloptError(f"an anchor called {name!r} exists already; choose another name")
    KEYS[name] = key


def anchor_key(name: str) -> AnchorKey | None:
    """Return the function registered as ``name``; None for ``observation``.

    Raises:
        RloptError: there is none.
    """
    if name == "observation":
        return None
    if name not in KEYS:
        raise RloptError(
            f"agent.anchor={name} is unknown; {hint(name, ['observation', *KEYS])} (or add it by "
            "rlopt.agents.register_anchor)"
        )
    return KEYS[name]


def tensor_anchors(
    obs: Obs,
    action: Tensor,
    episode: Tensor,
    group: Tensor,
    key: AnchorKey | None = None,
    digits: int | None = None,
    history: int = 0,
    nested: int = 0,
    info: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Return the anchor groups (M,) of M steps in the order of time, and ``nested`` finer levels behind them.

    Args:
        obs: (M, …) what was acted on.
        action: (M, …).
        episode: (M,) whose step it is.
        group: (M,) of which task.
        key: a registered function (None: the observation itself, every bit of it).
        digits: decimals to which floating observations are rounded first, since those of continuous states never
            repeat.
        history: so many earlier observations of the episode must agree as well.
        info: (M,) what was told with each observation, for ``key``; where it is not a number nothing was.
    """
    leaves = obs if isinstance(obs, dict) else {"": obs}
    if key is None:  # what nobody observes is no part of the observation
        leaves = {name: leaf for name, leaf in leaves.items() if name != "exact"}
    arrays = {name: _rounded(leaf.detach().cpu().numpy(), digits) for name, leaf in leaves.items()}
    episodes = episode.tolist()
    if key is None:
        rows = [np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8).reshape(len(x), -1) for x in arrays.values()]
        joint = np.concatenate(rows, 1) if len(rows) > 1 else rows[0]
        keys: list[Hashable] = [row.tobytes() for row in joint]
    else:
        keys = []
        before: dict[int, list[tuple[Any, Any]]] = {}
        actions = action.cpu().numpy()
        told = {name: fact.tolist() for name, fact in (info or {}).items()}
        for at, i in enumerate(episodes):
            seen = arrays[""][at] if "" in arrays else {name: x[at] for name, x in arrays.items()}
            past = before.setdefault(i, [])
            said = {name: fact[at] for name, fact in told.items() if not math.isnan(fact[at])}
            keys.append(key(seen, said, past))
            past.append((seen, actions[at]))
    return nested_anchors(keys, episodes, group, history, nested)


def text_anchors(
    turns: Sequence[tuple[Seen, str, str | None]],
    episodes: Sequence[int],
    group: Tensor,
    key: AnchorKey | None = None,
    history: int = 0,
    nested: int = 0,
) -> tuple[Tensor, ...]:
    """Do what ``tensor_anchors`` does for words: ``turns`` are what was seen, what was done, and the true state where
    it is known."""
    before: dict[int, list[tuple[Any, Any]]] = {}
    keys: list[Hashable] = []
    for (seen, action, exact), i in zip(turns, episodes, strict=True):
        past = before.setdefault(i, [])
        info = {"task": seen.task, "state": seen.state, "admissible": seen.admissible, "exact": exact}
        keys.append(seen.text if key is None else key(seen.text, info, past))
        past.append((seen.text, action))
    return nested_anchors(keys, episodes, group, history, nested)


def nested_anchors(
    keys: Sequence[Hashable], episodes: Sequence[int], group: Tensor, history: int = 0, nested: int = 0
) -> tuple[Tensor, ...]:
    """Return anchor groups (M,) of steps whose ``keys``, and the ``history`` before them, agree; behind them those that
    also agree in 1 … ``nested`` further ones. An episode that has not so many has begun: that must agree too."""
    past: dict[int, list[int]] = {}
    numbers: dict[Hashable, int] = {}
    own = [numbers.setdefault(key, len(numbers)) for key in keys]
    levels: list[list[Hashable]] = [[] for _ in range(nested + 1)]
    for number, i in zip(own, episodes, strict=True):
        line = past.setdefault(i, [])
        line.append(number)
        for extra, level in enumerate(levels):
            level.append(tuple(line[-1 - history - extra :]))
    return tuple(anchor_groups(level, group) for level in levels)


def _rounded(x: np.ndarray[Any, Any], digits: int | None) -> np.ndarray[Any, Any]:
    if not np.issubdtype(x.dtype, np.floating):
        return x
    rounded: np.ndarray[Any, Any] = (x if digits is None else x.round(digits)) + x.dtype.type(0.0)  # -0 is 0
    return rounded

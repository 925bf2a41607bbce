"""The edge: what comes from an environment is checked here, on every return, before it is a number of rlopt's.

What fits costs a few comparisons. What does not is told in one line, with the environment's name and the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding

from rlopt.envs.arrays import Array
from rlopt.envs.spaces import ActionCodec, Leaf, ObservationCodec, own_spaces
from rlopt.random import derive_seed
from rlopt.types import EnvSpec, RloptError, one_line

Env = gymnasium.Env[Any, Any]
Write = Callable[[list[Array], Any, Any], None]

DECLARED = ("agents", "agent_spaces", "reward_shape", "derived", "frame_stack", "facts")
"""Fields of ``EnvSpec`` that Gymnasium has no place for: an environment declares them in its ``metadata``, which every
wrapper, worker process and vector of environments passes on."""
_FIVE = "Gymnasium's five are observation, reward, terminated, truncated, info"
_RESET = "write reset(self, *, seed=None, options=None), beginning with super().reset(seed=seed)"
_FLOAT32, _FLOAT64, _UINT8, _BOOL = (np.dtype(t) for t in (np.float32, np.float64, np.uint8, np.bool_))


def spec_of(
    env: Env | gymnasium.vector.VectorEnv[Any, Any, Any],
    observations: ObservationCodec,
    actions: ActionCodec,
    env_id: str | None = None,
) -> EnvSpec:
    """Return what a Gymnasium environment, or a vector of them, is in rlopt's words.

    Raises:
        RloptError: what it declares in its metadata does not fit its spaces.
    """
    registered, declared = env.spec, {key: env.metadata[key] for key in DECLARED if key in (env.metadata or {})}
    if "agent_spaces" in declared:
        declared["agent_spaces"] = own_spaces(declared["agent_spaces"])
    return EnvSpec(
        id=env_id or (registered.id if registered else type(env.unwrapped).__name__),
        observation_space=observations.space,
        action_space=actions.space,
        episode_limit=registered.max_episode_steps if registered else None,
        **declared,
    )


class Edge:
    """Steps and resets environments of one kind, and checks all that they return.

    Args:
        env: one of them, whose spaces and metadata hold for all.
        env_id: the name in ``spec`` and in messages; by default the registered one.

    Raises:
        RloptError: a space is missing or has no translation.
    """

    def __init__(self, env: Any, env_id: str | None = None) -> None:
        for name in ("observation_space", "action_space"):
            if getattr(env, name, None) is None:
                raise RloptError(f"{env} has no {name}; set it in its __init__")
        self.observation_space: spaces.Space[Any] = env.observation_space
        self.observations, self.actions = ObservationCodec(env.observation_space), ActionCodec(env.action_space)
        self.spec = spec_of(env, self.observations, self.actions, env_id)
        self.write = observation_writer(self.spec.id, self.observations)
        self._nested = isinstance(env.observation_space, spaces.Dict | spaces.Tuple)
        self.step = _stepper(self.spec, self.write)
        """Take a step: see ``_stepper``."""

    def reset(
        self,
        env: Env,
        arrays: list[Array],
        row: int,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        noise_seed: int | None = None,
    ) -> None:
        """Begin an episode, and put its first observation into ``row`` of the ``arrays``.

        With ``seed`` the spaces are seeded too, from which an environment may sample. ``noise_seed`` begins the random
        numbers that come after the first state.
        """
        if seed is not None:
            _seed_spaces(env, seed)
        try:
            given = env.reset(seed=seed, options=dict(options) if options else None)
        except TypeError as e:
            if "unexpected keyword argument" in str(e) and any(f"'{name}'" in str(e) for name in ("seed", "options")):
                raise RloptError(f"{self.spec.id}: its reset takes no seed or options ({e}); {_RESET}") from e
            raise
        if noise_seed is not None:
            self._seed_noise(env, noise_seed)
        obs = check_first(given, self.spec.id)
        if self._nested:
            self._refuse_surplus(self.observation_space, obs, "")
        self.write(arrays, row, obs)

    def _refuse_surplus(self, space: spaces.Space[Any], obs: Any, where: str) -> None:
        """Refuse entries that the space does not have: they would be ignored."""
        if isinstance(space, spaces.Dict):
            children: Mapping[Any, spaces.Space[Any]] = space.spaces
        elif isinstance(space, spaces.Tuple):
            children = dict(enumerate(space.spaces))
        else:
            return
        given = obs.keys() if isinstance(obs, Mapping) else range(len(obs)) if isinstance(obs, tuple | list) else ()
        if surplus := [key for key in given if key not in children]:
            name = "/".join((where, str(surplus[0]))).lstrip("/")
            raise RloptError(f"{self.spec.id}: its observation has {name!r}, which its observation_space lacks")
        for key, child in children.items():
            if key in given:
                self._refuse_surplus(child, obs[key], f"{where}/{key}")

    def _seed_noise(self, env: Env, seed: int) -> None:
        if hasattr(env.unwrapped, "ale"):
            raise RloptError(f"{self.spec.id} has one random stream, in its emulator; it takes no noise_seeds")
        env.unwrapped.np_random = seeding.np_random(seed)[0]
        _seed_spaces(env, seed)


class End(NamedTuple):
    """How an episode ended, or what is told of one that goes on."""

    terminated: bool
    truncated: bool
    facts: list[float]
    """The ``spec.facts``; of an episode that goes on NaN where nothing is told yet."""


def _stepper(spec: EnvSpec, write: Write) -> Callable[[Env, Any, list[Array], int, Array], End | None]:
    """Return ``step(env, action, arrays, row, rewards)``, which takes a step, checks all that it gives, puts
    observation and reward into ``row`` of the arrays, and returns the ``End`` of the episode, or None where it goes on
    and there are no facts.

    It is a closure, because it runs at every step of the fastest environments.
    """
    env_id, apart, facts = spec.id, bool(spec.reward_shape), bool(spec.facts)

    def step(env: Env, action: Any, arrays: list[Array], row: int, rewards: Array) -> End | None:
        given = env.step(action)
        if type(given) is not tuple or len(given) != 5:
            given = check_step(given, env_id)
        obs, reward, terminated, truncated, info = given
        write(arrays, row, obs)
        rewards[row] = check_reward(reward, spec) if apart or not isinstance(reward, float) else reward
        if terminated is False and truncated is False and not facts:
            return None
        terminated, truncated = _flag(terminated, "terminated", env_id), _flag(truncated, "truncated", env_id)
        over = terminated or truncated
        if facts:
            return End(terminated, truncated, told_facts(info, spec, over))
        return End(terminated, truncated, []) if over else None

    return step


def _seed_spaces(env: Env, seed: int) -> None:
    """Seed every space of an environment and its wrappers: ``self.action_space.sample()`` draws from one of them."""
    seen: set[int] = set()
    while True:
        for name in ("action_space", "observation_space"):
            space = getattr(env, name)
            if id(space) not in seen:
                seen.add(id(space))
                space.seed(derive_seed(seed, name))
        if not isinstance(env, gymnasium.Wrapper):
            return
        env = env.env


# Observations


def observation_writer(env_id: str, codec: ObservationCodec, rows: int | None = None) -> Write:
    """Return ``write(arrays, row, obs)``, which checks one environment's observation and puts it into ``row`` of the
    arrays; with ``rows`` those of so many at once, of a Gymnasium vector environment, for the row ``slice(None)``."""
    lead = () if rows is None else (rows,)
    stored = enumerate(zip(codec.leaves, codec.shapes, codec.dtypes, strict=True))
    each = [_leaf_writer(env_id, leaf, place, (*lead, *shape), dtype) for place, (leaf, shape, dtype) in stored]
    if codec.single:
        return each[0]
    parts = list(zip(codec.getters, each, codec.leaves, strict=True))

    def write(arrays: list[Array], row: Any, obs: Any) -> None:
        for get, put, leaf in parts:
            try:
                value = get(obs)
            except (KeyError, IndexError, TypeError) as e:
                raise RloptError(f"{env_id}: its observation lacks {leaf.key!r}; it is {_shown(obs)}") from e
            put(arrays, row, value)

    return write


def _leaf_writer(env_id: str, leaf: Leaf, place: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Write:
    """Return what puts a value of one leaf into a row of the array at ``place``: at once where it is what it should be
    at first sight, else after a closer look."""
    space = leaf.space
    if isinstance(space, spaces.Discrete) and not shape:
        first, last = int(space.start), int(space.start + space.n - 1)

        def write_index(arrays: list[Array], row: Any, value: Any) -> None:
            if (type(value) is np.int64 or type(value) is int) and first <= value <= last:
                arrays[place][row] = value
            else:
                arrays[place][row] = _number(env_id, leaf, shape, dtype, value)

        return write_index
    array_type = np.ndarray  # a local name is found faster
    likely, other = {_FLOAT32: (_FLOAT64, _FLOAT32), _UINT8: (_UINT8, _BOOL), _BOOL: (_BOOL,) * 2}.get(
        dtype, (None,) * 2
    )

    def write(arrays: list[Array], row: Any, value: Any) -> None:
        if type(value) is array_type and value.shape == shape and ((kind := value.dtype) is likely or kind is other):
            arrays[place][row] = value
        else:
            arrays[place][row] = _number(env_id, leaf, shape, dtype, value)

    return write


def _number(env_id: str, leaf: Leaf, shape: tuple[int, ...], dtype: np.dtype[Any], value: Any) -> Array:
    """Return a value of a leaf as an array of numbers that ``dtype`` holds.

    Raises:
        RloptError: it is of another shape or kind, or lies outside of its space.
    """
    name = f"{env_id}: its observation {leaf.key}".rstrip()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise RloptError(f"{name} is {_shown(value)}, which is no array of numbers") from e
    if array.dtype.kind not in "biuf":
        raise RloptError(f"{name} is {_shown(value)}, which holds no numbers")
    if array.shape != shape:
        raise RloptError(f"{name} has shape {array.shape}, but its observation_space says {shape}: {_shown(value)}")
    if dtype.kind == "f":
        return array
    low, high = _range(leaf.space)
    if array.dtype.kind == "f":
        advice = "give whole numbers, or declare a Box of floats"
        raise RloptError(f"{name} is {_shown(value)}, with fractions, for {one_line(leaf.space)}; {advice}")
    outside = (array < low) | (array > high)
    if outside.any():
        raise RloptError(f"{name} has {array[outside].flat[0]}, which lies outside of {one_line(leaf.space)}")
    return array


def _range(space: spaces.Space[Any]) -> tuple[Any, Any]:
    """Return the least and the greatest numbers of a space of whole numbers."""
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return space.start, space.start + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
    return 0, 255


# What else reset and step give


def check_first(given: Any, env_id: str) -> Any:
    """Return the observation that ``reset`` gave, of one environment or of a vector of them.

    Raises:
        RloptError: it gave something else than the pair of observation and info.
    """
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[1], Mapping):
        raise RloptError(f"{env_id}: reset gave {_kind(given)}, not the pair observation, info (a dict)")
    return given[0]


def check_step(given: Any, env_id: str) -> Any:
    """Return the five values that ``step`` gave.

    Raises:
        RloptError: it gave something else.
    """
    if not isinstance(given, tuple | list) or len(given) != 5:
        old = ", as old Gym's step did" if isinstance(given, tuple) and len(given) == 4 else ""
        raise RloptError(f"{env_id}: step gave {_kind(given)}{old}; {_FIVE}")
    return given


def check_reward(reward: Any, spec: EnvSpec, *rows: int) -> Any:
    """Return the reward of one environment, or of a vector of ``rows``, as a number or an array of numbers.

    Raises:
        RloptError: it is of another shape than the environment's spec says, or holds no numbers.
    """
    try:
        array = np.asarray(reward)
    except (TypeError, ValueError, RuntimeError) as e:
        raise RloptError(f"{spec.id}: the reward is {_shown(reward)}, which is no number") from e
    if array.dtype.kind not in "biuf":
        raise RloptError(f"{spec.id}: the reward is {_shown(reward)}, which is no number")
    wanted = (*rows, *spec.reward_shape)
    if array.shape == wanted:
        return array if wanted else array.item()
    if array.size == 1 and not wanted:
        return array.item()
    raise RloptError(
        f"{spec.id} gives rewards of shape {array.shape}, not {wanted}; agents that are paid apart have "
        "metadata['reward_shape'] = (n,)"
    )


def _flag(value: Any, name: str, env_id: str) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer | np.ndarray) and np.size(value) == 1:
        number = np.asarray(value).item()
        if type(number) in (bool, int) and number in (0, 1):
            return bool(number)
    raise RloptError(f"{env_id}: {name} is {_shown(value)}; it must be True or False")


def check_flags(value: Any, name: str, env_id: str, rows: int) -> Array:
    """Return ``terminated`` or ``truncated`` (N,) of a Gymnasium vector environment.

    Raises:
        RloptError: it is no array of ``rows`` flags.
    """
    array = np.asarray(value)
    if array.dtype != np.bool_ or array.shape != (rows,):
        raise RloptError(f"{env_id}: {name} is {_shown(value)}; it must be an array of {rows} flags (bool)")
    return array


def told_facts(info: Any, spec: EnvSpec, over: bool = True) -> list[float]:
    """Return the ``spec.facts`` of an episode from the ``info`` of its last step; of one that is not ``over`` yet NaN
    where nothing is told.

    Raises:
        RloptError: one is missing or is no number, though the episode is over.
    """
    if not over:
        return [
            _told_so_far(info[name]) if isinstance(info, Mapping) and name in info else math.nan for name in spec.facts
        ]
    if not isinstance(info, Mapping):
        raise RloptError(f"{spec.id}: info is {_shown(info)}, not a dict with the facts {', '.join(spec.facts)}")
    found = []
    for name in spec.facts:
        if name not in info:
            there = ", ".join(map(str, info)) or "nothing"
            raise RloptError(f"{spec.id}: the last info of an episode lacks the fact {name!r}; there is {there}")
        try:
            found.append(float(info[name]))
        except (TypeError, ValueError) as e:
            raise RloptError(f"{spec.id}: the fact {name!r} must be a number, not {_shown(info[name])}") from e
    return found


def _told_so_far(value: Any) -> float:
    """Return a number, NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


# Words


def _shown(value: Any) -> str:
    """Return a value in a message of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(given: Any) -> str:
    if isinstance(given, tuple):
        return f"{len(given)} values" if len(given) != 2 else f"two values, {_shown(given)}"
    return "None" if given is None else f"{type(given).__name__} alone: {_shown(given)}"

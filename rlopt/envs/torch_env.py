"""Environments written in torch: N copies are one batch of tensors, on any device (``backend=torch``)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from gymnasium.envs.registration import EnvSpec as GymSpec
from torch import Tensor

from rlopt.config import hint
from rlopt.envs.base import BaseVectorEnv
from rlopt.envs.spaces import ActionCodec, ObservationCodec, own_spaces
from rlopt.envs.streams import RowStreams
from rlopt.types import (
    EnvSpec,
    Obs,
    RloptError,
    Space,
    State,
    Step,
    map_obs,
    map_obs2,
    obs_leaves,
    shape_of,
    tensor_dtype,
)


class Outcome(NamedTuple):
    """What ``TorchEnv.dynamics`` returns; a plain tuple will do, with what comes last left out."""

    state: Any
    """The next state, like ``TorchEnv.initial``'s."""
    reward: Tensor
    """(N,), or (N, n) where agents are paid apart."""
    terminated: Tensor
    """(N,) bool."""
    truncated: Tensor | None = None
    """(N,) bool, where the environment has limits of its own besides ``episode_limit``."""
    broken: Tensor | None = None
    """(N,) bool, where the simulation of a row may fail: that row is no transition (``valid`` is false) and begins
    anew."""
    facts: dict[str, Tensor] = {}
    """{name: (N,)} of the class's ``facts``, which count where an episode ends."""


class TorchEnv(BaseVectorEnv):
    """Base class of environments written in torch; a subclass is a vector environment (``VectorEnv``) of N rows.

    A subclass says what its spaces are and defines three functions of *all* rows at once; resets, time limits, frozen
    rows, seeds, saving and restoring are done here::

        class Drift(TorchEnv):
            observation_space = spaces.Box(-2.0, 2.0, (1,), np.float32)
            action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
            episode_limit = 50
            defaults = {"wind": 0.1}

            def initial(self, streams):
                return streams.uniform(-1.0, 1.0)                                # (N,)

            def dynamics(self, state, action):
                state = state + 0.1 * action[:, 0] + self.parameters["wind"]
                return state, -state.abs(), state.abs() > 2.0                     # state, reward, terminated

            def observe(self, state):
                return state[:, None]

    The three functions must not look into a tensor (``.item()``, ``if tensor:``, a boolean mask as an index, tensors
    made from Python lists): choose with ``torch.where``. Then a step never makes a GPU wait for the host, and may be
    captured in a CUDA graph. What belongs to an episode goes into the state, which is saved; an attribute does not.

    Train in it with ``env=module:Drift``, or register it with Gymnasium (``entry_point="module:Drift"``) for an id.

    Args:
        num_envs: N.
        seed, device, autoreset, env_id, stream: see ``rlopt.envs.base.Options``.
        max_episode_steps: replaces ``episode_limit``; -1 for no limit.
        **parameters: values of simulator parameters other than their defaults.

    Raises:
        RloptError: an unknown parameter, or a space without translation.
    """

    observation_space: Space
    """Box, Discrete, MultiDiscrete or MultiBinary, or a flat Dict of these, of one row."""
    action_space: Space
    """Box, Discrete or MultiDiscrete, of one row."""
    episode_limit: int | None = None
    """Steps after which an episode is truncated."""
    defaults: dict[str, float] = {}
    """Simulator parameters by name, and their values until ``set_parameters``."""
    agents: tuple[str, ...] = ()
    """Names of several agents, which are the first axis of the spaces (see ``EnvSpec``); empty for a single one."""
    agent_spaces: Sequence[tuple[Space, Space]] = ()
    """What each of them sees and does, where they differ."""
    reward_shape: tuple[int, ...] = ()
    """(n,) where n agents are paid apart."""
    derived: Mapping[str, Any] = {}
    """{leaf: index}: leaves that are a gather of the leaf ``state`` (see ``EnvSpec``)."""
    facts: tuple[str, ...] = ()
    """Names of what ``dynamics`` tells of an episode where it ends (``Outcome.facts``)."""
    dtype: ClassVar[torch.dtype] = torch.float64
    """Of parameters and random numbers."""
    draws_rows: ClassVar[bool] = False
    """Whether ``initial`` draws for as many rows as its streams have (``streams.n``), and not always for N: where
    drawing costs much, only those that begin anew are then drawn for (on the CPU)."""

    state: Any
    """The rows' present state, made by the first ``reset`` and then written in place."""

    def __init__(
        self,
        num_envs: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        autoreset: bool = True,
        env_id: str | None = None,
        stream: str = "env",
        max_episode_steps: int | None = None,
        **parameters: float,
    ) -> None:
        super().__init__(num_envs, seed=seed, device=device, autoreset=autoreset, env_id=env_id, stream=stream)
        if max_episode_steps is not None:
            self.episode_limit = max_episode_steps if max_episode_steps > 0 else None
        for name in ("observation_space", "action_space"):
            if not hasattr(self, name):
                raise RloptError(f"{type(self).__name__} has no {name}; give the class one")
        self.spec = EnvSpec(
            id=env_id or type(self).__name__,
            observation_space=ObservationCodec(self.observation_space).space,
            action_space=ActionCodec(self.action_space).space,
            episode_limit=self.episode_limit,
            agents=self.agents,
            agent_spaces=own_spaces(self.agent_spaces),
            reward_shape=self.reward_shape,
            derived=self.derived,
            facts=self.facts,
        )
        self.parameters: dict[str, Tensor] = {
            name: torch.full((num_envs,), float(value), dtype=self.dtype, device=self.device)
            for name, value in self.defaults.items()
        }
        """Simulator parameters, (N,) each, written in place by ``set_parameters``."""
        self.set_parameters(**parameters)
        self._streams = RowStreams(num_envs, self.device, self.dtype)
        self._looks = self._away is None
        """Whether to see if some row ended before new episodes are drawn: on the CPU that makes nobody wait."""
        self._elapsed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self._dtypes = {key: tensor_dtype(s) for key, s in obs_leaves(self.spec.observation_space).items()}
        shape = self.spec.action_space.shape
        assert shape is not None
        self._action_shape = (num_envs, *shape)
        leaves = obs_leaves(self.spec.observation_space).items()
        self._observed = {key: (num_envs, *shape_of(space)) for key, space in leaves}
        self._paid = (num_envs, *self.reward_shape)

    # What a subclass defines

    def initial(self, streams: RowStreams) -> Any:
        """Return states in which episodes begin, drawn for all N rows: a tensor (N, …), or a flat dict of them."""
        raise NotImplementedError

    def dynamics(self, state: Any, action: Tensor) -> tuple[Any, ...]:
        """Return an ``Outcome``: the next state, the reward (N,) and whether the episode terminates (N,), for all rows.

        ``action`` is (N, …), of the action space's shape: in environment units (not clipped), or int64. Random numbers
        come from ``self.streams``.
        """
        raise NotImplementedError

    def observe(self, state: Any) -> Obs:
        """Return the observations (N, …) of these states; they are cast to what the space says."""
        raise NotImplementedError

    # The contract

    @property
    def streams(self) -> RowStreams:
        """One random stream per row."""
        return self._streams

    @torch.no_grad()
    def _begin(
        self,
        seeds: Sequence[int] | None,
        mask: Tensor | None,
        options: dict[str, Any] | None,
        noise_seeds: Sequence[int] | None,
    ) -> Obs:
        """Raises RloptError where ``options`` are given."""
        if options:
            raise RloptError(f"{self.spec.id} on backend=torch takes no reset options; use backend=sync for them")
        if mask is None:
            mask = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        mask = mask.to(self.device, torch.bool)
        if seeds is not None:
            self._streams.seed(seeds, mask)
        first = self.initial(self._streams)
        if not self._started:
            self.state = map_obs(torch.clone, first)
        self._restart(mask, first)
        if noise_seeds is not None:
            self._streams.seed(noise_seeds, mask)
        return self._observe()

    @torch.no_grad()
    def step(self, action: Tensor) -> Step:
        """Step all rows; see ``VectorEnv.step``. Never waits for the device."""
        if not self._started:
            raise self._not_begun()
        outcome = self._checked(self.dynamics(self.state, self._check(action)))
        live = ~self._ended
        broken = None if outcome.broken is None else outcome.broken & live
        valid = live if broken is None else live & ~broken
        self._streams.commit(live)
        self._elapsed.add_(valid)
        terminated, truncated = outcome.terminated & valid, outcome.truncated
        if self.episode_limit is not None:
            late = self._elapsed >= self.episode_limit
            truncated = late if truncated is None else truncated | late
        truncated = torch.zeros_like(valid) if truncated is None else truncated & valid
        ended = terminated | truncated
        reward = outcome.reward
        if broken is not None or not self.autoreset:  # rows that are no transitions are not paid
            reward = torch.where(valid.unsqueeze(1) if self.reward_shape else valid, reward, 0.0)
        reward = reward.to(torch.float32, copy=True)

        self._write(outcome.state if self.autoreset else _select(live, outcome.state, self.state))
        closed = ended if broken is None else ended | broken
        if self._looks and not closed.any():
            obs = self._observe()
            return Step(obs, obs, reward, terminated, truncated, closed, valid, outcome.facts)
        if not self.autoreset:
            self._ended.logical_or_(ended)
            if broken is not None:
                self._restart(broken, self.initial(self._streams))
            obs = self._observe()
            return Step(obs, obs, reward, terminated, truncated, closed, valid, outcome.facts)
        if self._looks and self.draws_rows and broken is None:
            next_obs = self._observe()
            self._restart_rows(closed)
            return Step(self._observe(), next_obs, reward, terminated, truncated, closed, valid, outcome.facts)
        first = self.initial(self._streams)
        if broken is not None:  # the row's new episode is all that there is to see
            self._write(_select(broken, first, self.state))
        next_obs = self._observe()
        self._restart(closed, first)
        return Step(self._observe(), next_obs, reward, terminated, truncated, closed, valid, outcome.facts)

    def _restart(self, mask: Tensor, first: Any) -> None:
        """New episodes in the rows where ``mask`` is true, from the states ``first`` just drawn."""
        self._streams.commit(mask)
        self._write(_select(mask, first, self.state))
        self._elapsed.masked_fill_(mask, 0)
        self._ended.masked_fill_(mask, False)

    def _restart_rows(self, mask: Tensor) -> None:
        """Begin new episodes in the rows where ``mask`` is true, and draw for those alone."""
        rows = mask.nonzero().squeeze(1)
        streams = self._streams.of(rows)
        first = self.initial(streams)
        self._streams.commit(mask, streams)
        map_obs2(lambda old, new: old.index_copy_(0, rows, new.to(old.dtype)), self.state, first)
        self._elapsed.masked_fill_(mask, 0)
        self._ended.masked_fill_(mask, False)

    def set_parameters(self, **values: float | Tensor) -> None:
        """Give simulator parameters new values, one number for all rows or (N,); they last until the next call.

        Raises:
            RloptError: a parameter that this environment lacks, or a tensor of another shape.
        """
        for name, value in values.items():
            if name not in self.parameters:
                raise RloptError(f"{type(self).__name__} has no parameter {name!r}; {hint(name, self.parameters)}")
            if isinstance(value, Tensor) and value.shape not in ((), (self.num_envs,)):
                raise RloptError(
                    f"parameter {name} has shape {tuple(value.shape)}; it must be one number or ({self.num_envs},)"
                )
            self.parameters[name].copy_(value) if isinstance(value, Tensor) else self.parameters[name].fill_(value)

    def state_dict(self) -> State | None:
        """Return state, clocks, random streams and parameters; None before the first ``reset``."""
        if not self._started:
            return None
        return {
            "state": map_obs(torch.clone, self.state),
            "elapsed": self._elapsed.clone(),
            "ended": self._ended.clone(),
            "streams": self._streams.state_dict(),
            "parameters": {name: value.clone() for name, value in self.parameters.items()},
        }

    def load_state_dict(self, state: State) -> Obs:
        """Continue bit for bit where ``state_dict`` stood; returns the observations to act on.

        Raises:
            RloptError: the state is of another number of environments, or of another environment.
        """
        saved = state["elapsed"].shape[0]
        if saved != self.num_envs:
            raise RloptError(f"the saved state holds {saved} environments, but num_envs is {self.num_envs}")
        if set(state["parameters"]) != set(self.parameters):
            raise RloptError(f"the saved state is not of {self.spec.id}: its parameters have other names")
        if not self._started:
            self.state, self._started = map_obs(lambda t: t.to(self.device, copy=True), state["state"]), True
        self._write(state["state"])
        self._elapsed.copy_(state["elapsed"])
        self._ended.copy_(state["ended"])
        self._streams.load_state_dict(state["streams"])
        self.set_parameters(**state["parameters"])
        return self._observe()

    def _check(self, action: Tensor) -> Tensor:
        if action.shape != self._action_shape:
            raise RloptError(
                f"actions have shape {tuple(action.shape)}, but {self.num_envs} environments of {self.action_space} "
                f"want {self._action_shape}"
            )
        return action.to(self.device)

    def _checked(self, given: tuple[Any, ...]) -> Outcome:
        """Return the edge of what a subclass computes: only shapes and types, so that the device is not waited for."""
        if not isinstance(given, tuple) or not 3 <= len(given) <= len(Outcome._fields):
            raise RloptError(
                f"{self.spec.id}: dynamics gave {type(given).__name__}, not a tuple of state, reward, terminated and, "
                "where there are some, truncated, broken, facts"
            )
        outcome, rows = Outcome(*given), (self.num_envs,)
        if outcome.reward.shape != self._paid:
            paid = tuple(outcome.reward.shape)
            raise RloptError(f"{self.spec.id}: the reward has shape {paid}; it must be {self._paid}")
        for place, flag in enumerate(given[2:5], 2):
            if flag is not None and (flag.shape != rows or flag.dtype is not torch.bool):
                what = f"{flag.dtype} of shape {tuple(flag.shape)}"
                raise RloptError(
                    f"{self.spec.id}: {Outcome._fields[place]} is {what}; it must be torch.bool of shape {rows}"
                )
        facts = outcome.facts
        if (facts or self.facts) and (set(self.facts) != facts.keys() or any(x.shape != rows for x in facts.values())):
            found = {name: tuple(fact.shape) for name, fact in facts.items()}
            raise RloptError(f"{self.spec.id}: dynamics gave the facts {found}; they must be {self.facts}, each {rows}")
        return outcome

    def _write(self, state: Any) -> None:
        """In place, because a captured graph reads the state where it was captured."""
        if not isinstance(self.state, dict):
            self.state.copy_(state)
            return
        # A leaf may be another one's old value (``{"now": …, "before": state["now"]}``), which would be overwritten.
        old = {value.untyped_storage().data_ptr() for value in self.state.values()}
        new = {k: v.clone() if v.untyped_storage().data_ptr() in old else v for k, v in state.items()}
        for key, value in self.state.items():
            value.copy_(new[key])

    def _observe(self) -> Obs:
        """Return a copy in the contract's types: an observation may be the state itself, which changes in place."""
        obs = self.observe(self.state)
        if isinstance(obs, Tensor) and obs.shape == self._observed.get(""):
            return obs.to(self._dtypes[""], copy=True)
        leaves = obs if isinstance(obs, dict) else {"": obs}
        if leaves.keys() != self._observed.keys() or any(x.shape != self._observed[k] for k, x in leaves.items()):
            found = {key: tuple(leaf.shape) for key, leaf in leaves.items()}
            raise RloptError(f"{self.spec.id}: observe gave {found}, but its observation_space says {self._observed}")
        return {key: value.to(self._dtypes[key], copy=True) for key, value in leaves.items()}


def _select(mask: Tensor, new: Any, old: Any) -> Any:
    """Row by row the new state where ``mask`` (N,) is true, else the old one."""
    return map_obs2(lambda a, b: torch.where(mask.view(-1, *[1] * (b.dim() - 1)), a, b), new, old)


def own_class(spec: GymSpec) -> type[TorchEnv] | None:
    """Return the ``TorchEnv`` that is a registered environment's entry point, where it is one and has been imported."""
    entry: Any = spec.entry_point
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(sys.modules.get(module), name, None)
    return entry if isinstance(entry, type) and issubclass(entry, TorchEnv) else None


def class_spec(env_id: str) -> GymSpec | None:
    """Return what registering ``module:Class`` would say, where it names a ``TorchEnv`` of an imported module."""
    module, _, name = env_id.rpartition(":")
    cls = getattr(sys.modules.get(module), name, None)
    if not (isinstance(cls, type) and issubclass(cls, TorchEnv)):
        return None
    return GymSpec(name, entry_point=env_id, max_episode_steps=cls.episode_limit)

"""MaMuJoCo: Gymnasium's MuJoCo tasks moved by several agents, natively with all rows at once or as one environment."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.arrays import Array
from rlopt.envs.native.parameters import ParametricNativeEnv
from rlopt.envs.native.tasks import Fields, Task
from rlopt.envs.snapshot import restore, snapshot
from rlopt.envs.teams.partitions import SEGMENTED, beside, divide, seen, segments, source_of
from rlopt.joint import join_spaces
from rlopt.types import Obs, RloptError, State, own_index

VIEWS = ("obsk", "full")


class Factorization:
    """What the agents of a task see and do, as gathers.

    Args:
        scenario: ``HalfCheetah`` …
        partition: ``2x3`` …
        agent_obsk: see ``MaMuJoCoEnv``; so is view.
        env: the unwrapped single-agent environment.

    Raises:
        RloptError: an unknown task, partition, depth or view.
    """

    def __init__(self, scenario: str, partition: str, agent_obsk: int | None, view: str, env: Any) -> None:
        if view not in VIEWS:
            raise RloptError(f"view={view!r} must be one of {', '.join(VIEWS)}")
        whole = isinstance(agent_obsk, int) and not isinstance(agent_obsk, bool) and agent_obsk >= 0
        if agent_obsk is not None and not whole:
            raise RloptError(f"agent_obsk={agent_obsk!r} must be 0, 1, … joints, or null for one agent that is all")
        graph, parts = divide(scenario, partition)
        self.source, self.full = source_of(scenario, env), view == "full"
        size, controls = self.source.size, int(env.action_space.shape[0])
        act = [[joint.control for joint in part] for part in parts]
        see = [seen(graph, part, self.source, agent_obsk or 0) for part in parts]
        if agent_obsk is None:
            act, see = [list(range(controls))], [list(range(size))]
        n = len(act)
        self.agents = tuple(f"agent_{i}" for i in range(n))
        widths = [size + n] * n if self.full else [len(places) for places in see]
        low, high = env.action_space.low[0], env.action_space.high[0]
        self.own = [
            (spaces.Box(-np.inf, np.inf, (width,), np.float64), spaces.Box(low, high, (len(places),), np.float32))
            for width, places in zip(widths, act, strict=True)
        ]
        self.observation_space, self.action_space = join_spaces(self.own, spaces.Box(-np.inf, np.inf, (size,)))
        self.places = np.full((n, max(widths)), -1)
        """(n, O): where in the source each number lies that an agent sees, -1 for padding."""
        for i, places in enumerate(() if self.full else see):
            self.places[own_index(i, (len(places),))] = places
        self.padded = bool((self.places < 0).any()) and not self.full
        self._gather = np.where(self.places < 0, 0, self.places).reshape(-1)
        # The reference hands a single agent's action on as it is, so that its cost is summed in float32.
        self._precision = np.float32 if agent_obsk is None else np.float64
        width = max(map(len, act))
        self._controls = np.zeros(controls, np.int64)
        for i, places in enumerate(act):
            self._controls[places] = i * width + np.arange(len(places))
        self._names = np.eye(n)

    @property
    def metadata(self) -> dict[str, Any]:
        """What an environment of these agents declares."""
        declared: dict[str, Any] = {"agents": self.agents, "agent_spaces": self.own}
        if not self.full and self.places.max() < self.source.size:
            declared["derived"] = {"obs": self.places}
        return declared

    def controls(self, action: Array) -> Array:
        """Return the controls (…, A) of joint actions (…, n, A/n), in the reference's precision."""
        flat = action.reshape(*action.shape[:-2], -1)
        # Taken, for an index would leave the rows' axis innermost, and NumPy would add the squares in another order.
        return flat.take(self._controls, -1).astype(self._precision)

    def observe(self, source: Array) -> dict[str, Array]:
        """Return what the agents see, (…, n, O), and the state, (…, S), of sources (…, D)."""
        state = source[..., : self.source.size] if self.source.extra else source
        if self.full:
            return self._scored(state)
        obs = source.take(self._gather, -1).reshape(*source.shape[:-1], *self.places.shape)
        if self.padded:
            obs[..., self.places < 0] = 0
        return {"obs": obs, "state": state}

    def _scored(self, state: Array) -> dict[str, Array]:
        """Return the view of HARL: every agent sees the state and its own number (one-hot), both it and the critic's
        state less their mean over their own entries, through their deviation."""
        n, lead = len(self.agents), state.shape[:-1]
        each = np.broadcast_to(state[..., None, :], (*lead, n, state.shape[-1]))
        obs = np.concatenate((each, np.broadcast_to(self._names, (*lead, n, n))), -1)
        return {"obs": _score(obs), "state": _score(state)}


def _score(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)  # type: ignore[no-any-return]


class MaMuJoCoEnv(gymnasium.Env[Any, Any]):
    """A MuJoCo task of Gymnasium (v5) whose joints belong to several agents, as in ``gymnasium_robotics.mamujoco_v1``.

    Observation: ``obs``, what each agent sees, and ``state``, the observation of the single-agent task. One reward for
    all. Other keywords go to the single-agent task.

    Args:
        scenario: ``Ant``, ``HalfCheetah``, … (``rlopt.envs.teams.partitions.SCENARIOS``).
        partition: whose joints are whose: ``KxM``, M to each of K agents, or a name (``2x4d``, ``9_8``, ``3p``).
        agent_obsk: up to which distance in the graph of joints an agent sees positions of others' joints; None: one
            agent sees and moves everything.
        view: ``obsk`` or, as in HARL's experiments, ``full``: each agent sees the whole state and its own number,
            z-scored over its entries at every step, and critics the state z-scored; returns of the two are of different
            tasks.

    Raises:
        RloptError: see ``Factorization``.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "depth_array"]}

    def __init__(
        self,
        scenario: str,
        partition: str,
        agent_obsk: int | None = 1,
        view: str = "obsk",
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        divide(scenario, partition)  # refuses a wrong one before anything is built
        self._single = _single_agent(scenario, partition, render_mode=render_mode, **kwargs)
        single: Any = self._single.unwrapped
        self.render_mode = render_mode
        self.model, self.frame_skip = single.model, single.frame_skip
        self.factors = Factorization(scenario, partition, agent_obsk, view, single)
        self.observation_space, self.action_space = self.factors.observation_space, self.factors.action_space
        self.metadata = {**single.metadata, **self.factors.metadata}

    @property
    def single(self) -> Any:
        """The unwrapped single-agent environment."""
        return self._single.unwrapped

    @property
    def np_random(self) -> np.random.Generator:
        """The single-agent environment's."""
        return self._single.unwrapped.np_random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self._single.unwrapped.np_random = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seen, info = self._single.reset(seed=seed, options=options)
        return self._observed(seen), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        seen, reward, terminated, truncated, info = self._single.step(self.factors.controls(np.asarray(action)))
        return self._observed(seen), reward, terminated, truncated, info

    def _observed(self, seen: Any) -> dict[str, Array]:
        data: Any = self.single.data
        fields = {"qpos": data.qpos, "qvel": data.qvel, "xpos": data.xpos}
        behind = beside(self.factors.source.extra, fields)
        return self.factors.observe(seen if behind is None else np.concatenate((seen, behind)))

    def render(self) -> Any:
        return self._single.render()

    def close(self) -> None:
        self._single.close()

    def state_dict(self) -> State:
        """Return the single-agent environment's state."""
        state = snapshot(self._single)
        assert state is not None
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue where ``state_dict`` stood."""
        restore(self._single, state)


def _single_agent(scenario: str, partition: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Return the task without time limit, which the team has."""
    common = {"max_episode_steps": -1, "disable_env_checker": True, **kwargs}
    if scenario not in SEGMENTED:
        return gymnasium.make(f"{scenario}-v5", **common)
    from gymnasium_robotics.envs.multiagent_mujoco import many_segment_ant, many_segment_swimmer

    make = many_segment_ant.gen_asset if scenario == "ManySegmentAnt" else many_segment_swimmer.gen_asset
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "body.xml"
        make(n_segs=segments(partition), asset_path=str(path))
        return gymnasium.make(f"{scenario[11:]}-v5", xml_file=str(path), **common)


class _Seen(Task):
    """A task that observes its source."""

    def __init__(self, task: Task, extra: str) -> None:
        self.derived, self.contact_forces = task.derived, task.contact_forces
        self.measure, self.outcome, self.draw = task.measure, task.outcome, task.draw  # type: ignore[method-assign]
        self._task, self._extra = task, extra

    def observe(self, d: Fields) -> Array:
        seen, behind = self._task.observe(d), beside(self._extra, d)
        return seen if behind is None else np.concatenate((seen, behind), -1)


class NativeTeamEnv(ParametricNativeEnv):
    """``MaMuJoCoEnv`` natively: N rows, physics and reward of the single-agent task, and a gather per step.

    Args:
        env: what Gymnasium builds of ``MaMuJoCoEnv``.
        task: the single-agent task's arithmetic.
        num_envs: N.
        options: see ``rlopt.envs.native.NativeVectorEnv``.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], task: type[Task], num_envs: int, **options: Any) -> None:
        team: Any = env.unwrapped
        self._factors: Factorization = team.factors
        self._places = torch.from_numpy(self._factors.places.clip(0)).reshape(-1)
        self._there = torch.from_numpy(self._factors.places >= 0)
        make = partial(_task, task, self._factors.source.extra)
        super().__init__(env, make, num_envs, **options)
        self._places, self._there = self._places.to(self.device), self._there.to(self.device)

    def _check_shape(self, found: tuple[int, ...], declared: tuple[int, ...]) -> None:
        pass  # the task observes the source, of which the declared leaves are made

    def _controls(self, action: Tensor) -> Array:
        if action.dtype is torch.float32 and action.shape == self._action_shape:
            return self._factors.controls(action.numpy(force=True))
        return self._factors.controls(self._actions.batch(action, self.num_envs))

    def _tensor(self, array: Array) -> Obs:
        factors = self._factors
        if factors.full or self._away is None:  # gathered in float32, which is less to move
            leaves = factors.observe(array if factors.full else array.astype(self._dtype))
            return {key: self._sent(leaf) for key, leaf in leaves.items()}
        source = self._sent(array)
        obs = source.index_select(1, self._places).view(-1, *self._there.shape)
        return {"obs": obs * self._there if factors.padded else obs, "state": source[:, : factors.source.size]}

    def _sent(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array.astype(self._dtype, order="C", copy=False))
        return tensor if self._away is None else tensor.to(self._away)


def _task(task: type[Task], extra: str, team: MaMuJoCoEnv) -> Task:
    return _Seen(task(team.single, 5), extra)


def native(factory: Any, tasks: dict[str, type[Task]], num_envs: int, **options: Any) -> NativeTeamEnv:
    """Return ``num_envs`` native copies of what ``factory`` builds; ``tasks`` are Gymnasium's by their modules."""
    env = factory()
    scenario: Sequence[str] = type(env.unwrapped.single).__module__.rpartition(".")[2].rpartition("_v")
    return NativeTeamEnv(env, tasks[scenario[0]], num_envs, **options)

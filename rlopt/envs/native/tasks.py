"""Gymnasium's MuJoCo tasks over rows: observation, reward, termination and reset noise of many copies at once.

Each class is one of ``gymnasium.envs.mujoco`` and repeats its arithmetic operation by operation, in the same order and
precision, so that equal physics gives equal bits. Constants, ranges and weights are read from an environment that
Gymnasium has built, so every keyword of its constructor means here what it means there.

Shapes: n rows, nq positions, nv velocities, A actuators, D observations. A single row comes without its axis (an
observation is then (D,) and a reward a scalar), because NumPy's scalars are several times faster than arrays of one
number. Everything is float64 but the action, which is float32 as Gymnasium's action space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlopt.envs.arrays import Array

Fields = Mapping[str, Array]
"""MuJoCo's data by field name, each (n, …) or of one row."""


class Task:
    """One kind of task.

    Args:
        env: the unwrapped Gymnasium environment whose numbers are used.
        version: Gymnasium's version of the task, 4 or 5.
    """

    derived: tuple[str, ...] = ()
    """Fields that are read beside qpos and qvel."""
    contact_forces = False
    """Whether ``cfrc_ext`` is read, which only ``mj_rnePostConstraint`` computes."""

    def __init__(self, env: Any, version: int) -> None:
        self.version = version
        self.dt: float = env.dt
        self.init_qpos: Array = env.init_qpos.copy()
        self.init_qvel: Array = env.init_qvel.copy()
        self.noise: float = getattr(env, "_reset_noise_scale", 0.01)
        self.skip = 0
        """Leading positions that the observation leaves out."""

    def observe(self, d: Fields) -> Array:
        """Return observations (n, D)."""
        return np.concatenate((d["qpos"][..., self.skip :], d["qvel"]), axis=-1)

    def measure(self, d: Fields) -> Array:
        """Return what the next step's reward compares with, (n, …): it is the part of the state that MuJoCo's is
        not."""
        return d["qpos"][..., 0].copy()

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        """Return rewards (n,) and terminations (n,), or None where the task never ends.

        ``before`` and ``after`` are what ``measure`` returned before and after the step; ``action`` is (n, A).
        """
        raise NotImplementedError

    def draw(self, generator: np.random.Generator) -> tuple[Array, Array]:
        """Return positions (nq,) and velocities (nv,) of a new episode, by the same draws in the same order."""
        qpos = self.init_qpos + generator.uniform(-self.noise, self.noise, self.init_qpos.size)
        return qpos, self.init_qvel + self.draw_velocity(generator)

    def draw_velocity(self, generator: np.random.Generator) -> Array:
        """Return the noise on the velocities (nv,)."""
        return generator.uniform(-self.noise, self.noise, self.init_qvel.size)


def _clip(x: Array, low: float, high: float) -> Array:
    """``np.clip`` without the time that it takes to find its loop."""
    return np.minimum(np.maximum(x, low), high)


def _sum(x: Array) -> Array:
    """(n, k) → (n,): ``x.sum(-1)`` without its wrapper; NumPy adds a row as it adds a single vector."""
    return np.add.reduce(x, -1)  # type: ignore[no-any-return]


def _all(x: Array) -> Array:
    """(n, k) → (n,)."""
    return np.logical_and.reduce(x, -1)  # type: ignore[no-any-return]


def _flat(x: Array) -> Array:
    """(n, bodies, 6) → (n, bodies · 6)."""
    return x.reshape(*x.shape[:-2], -1)


def _norm(x: Array) -> Array:
    """(n, k) → (n,): the dot product that ``np.linalg.norm`` takes of a single vector, which its ``axis`` does not."""
    return np.sqrt((x[..., None, :] @ x[..., :, None])[..., 0, 0])  # type: ignore[no-any-return]


class Swimmer(Task):
    """Swimmer v4 and v5."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.skip = 2 if env._exclude_current_positions_from_observation else 0
        self.forward_weight, self.ctrl_weight = env._forward_reward_weight, env._ctrl_cost_weight

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        forward = self.forward_weight * ((after - before) / self.dt)
        return forward - self.ctrl_weight * _sum(np.square(action)), None


class HalfCheetah(Swimmer):
    """HalfCheetah v4 and v5."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.skip = 1 if env._exclude_current_positions_from_observation else 0

    def draw_velocity(self, generator: np.random.Generator) -> Array:
        return self.noise * generator.standard_normal(self.init_qvel.size)


class _Healthy(Task):
    """Tasks that pay for staying healthy. Version 4 pays for every step where unhealthiness ends the episode."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.forward_weight = getattr(env, "_forward_reward_weight", 1.0)
        self.ctrl_weight = env._ctrl_cost_weight
        self.healthy_reward, self.terminate = env._healthy_reward, env._terminate_when_unhealthy
        self.always_paid = version == 4 and bool(self.terminate)
        self.z_range = env._healthy_z_range

    def healthy(self, d: Fields) -> Array:
        """Return which rows are healthy, (n,) bool."""
        low, high = self.z_range
        z = d["qpos"][..., 2]
        return (low < z) & (z < high)  # type: ignore[no-any-return]

    def costs(self, d: Fields, action: Array) -> Array:
        """Return what the actions cost, (n,)."""
        return self.ctrl_weight * _sum(np.square(action))  # type: ignore[no-any-return]

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        healthy = self.healthy(d)
        forward = self.forward_weight * ((after - before) / self.dt)
        paid = 1.0 * self.healthy_reward if self.always_paid else healthy * self.healthy_reward
        return forward + paid - self.costs(d, action), ~healthy if self.terminate else None


class Walker2d(_Healthy):
    """Walker2d v4 and v5."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.skip = 1 if env._exclude_current_positions_from_observation else 0
        self.low, self.high = (np.array(pair) for pair in zip(self.z_range, env._healthy_angle_range, strict=True))

    def observe(self, d: Fields) -> Array:
        return np.concatenate((d["qpos"][..., self.skip :], _clip(d["qvel"], -10, 10)), axis=-1)

    def healthy(self, d: Fields) -> Array:
        height_and_angle = d["qpos"][..., 1:3]
        return _all((self.low < height_and_angle) & (height_and_angle < self.high))


class Hopper(Walker2d):
    """Hopper v4 and v5."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        low, high = env._healthy_state_range  # of all but the position and the height
        others = np.ones(self.init_qpos.size + self.init_qvel.size - 3)
        self.low[1], self.high[1] = max(low, self.low[1]), min(high, self.high[1])
        self.low, self.high = np.append(self.low, low * others), np.append(self.high, high * others)

    def healthy(self, d: Fields) -> Array:
        state = np.concatenate((d["qpos"][..., 1:], d["qvel"]), axis=-1)
        return _all((self.low < state) & (state < self.high))


class Ant(_Healthy):
    """Ant v4 and v5."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.derived = ("xpos",)
        self.skip = 2 if env._exclude_current_positions_from_observation else 0
        self.body: int = env.data.body(env._main_body if version == 5 else "torso").id
        self.contact_weight, self.contact_range = env._contact_cost_weight, env._contact_force_range
        self.contact_cost = bool(env._use_contact_forces) if version == 4 else self.contact_weight != 0
        self.contacts_from: int | None = None
        """The first body whose contact force is observed, None for no contact forces."""
        if version == 4:
            self.contacts_from = 0 if env._use_contact_forces else None
        elif env._include_cfrc_ext_in_observation:
            self.contacts_from = 1
        self.contact_forces = self.contact_cost or self.contacts_from is not None
        if self.contact_forces:
            self.derived += ("cfrc_ext",)

    def draw_velocity(self, generator: np.random.Generator) -> Array:
        return self.noise * generator.standard_normal(self.init_qvel.size)

    def observe(self, d: Fields) -> Array:
        if self.contacts_from is None:
            return super().observe(d)
        contacts = _clip(d["cfrc_ext"], *self.contact_range)[..., self.contacts_from :, :]
        return np.concatenate((d["qpos"][..., self.skip :], d["qvel"], _flat(contacts)), axis=-1)

    def measure(self, d: Fields) -> Array:
        return d["xpos"][..., self.body, 0].copy()

    def healthy(self, d: Fields) -> Array:
        low, high = self.z_range
        z = d["qpos"][..., 2]
        finite = _all(np.isfinite(d["qpos"])) & _all(np.isfinite(d["qvel"]))
        return finite & (low <= z) & (z <= high)  # type: ignore[no-any-return]

    def costs(self, d: Fields, action: Array) -> Array:
        costs = super().costs(d, action)
        if self.contact_cost:
            squares = np.square(_clip(d["cfrc_ext"], *self.contact_range))
            costs = costs + self.contact_weight * _sum(_flat(squares))
        return costs


class _HumanoidBody:
    """What Humanoid and HumanoidStandup observe: version 4 everything, version 5 without the world's and the root's
    empty entries, and only what its keywords include."""

    def __init__(self, env: Any, version: int) -> None:
        self.first_body, self.first_force = (1, 6) if version == 5 else (0, 0)
        parts = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
        self.parts = tuple(p for p in parts if version == 4 or getattr(env, f"_include_{p}_in_observation") is True)

    def observe(self, d: Fields, skip: int) -> Array:
        found = [d["qpos"][..., skip:], d["qvel"]]
        for name in self.parts:
            if name == "qfrc_actuator":
                found.append(d[name][..., self.first_force :])
            else:
                found.append(_flat(d[name][..., self.first_body :, :]))
        return np.concatenate(found, axis=-1)


class Humanoid(_Healthy):
    """Humanoid v4 and v5."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.skip = 2 if env._exclude_current_positions_from_observation else 0
        self.body = _HumanoidBody(env, version)
        self.mass: Array = env.model.body_mass.copy()
        self.derived = ("ctrl", "xipos", *self.body.parts)
        self.contact_forces = "cfrc_ext" in self.body.parts
        if version == 5:
            self.contact_weight, self.contact_range = env._contact_cost_weight, env._contact_cost_range
            self.contact_forces |= self.contact_weight != 0
            self.derived = tuple(dict.fromkeys((*self.derived, "cfrc_ext")))

    def observe(self, d: Fields) -> Array:
        return self.body.observe(d, self.skip)

    def measure(self, d: Fields) -> Array:
        centre = np.einsum("b,...bj->...j", self.mass, d["xipos"])
        return (centre / self.mass.sum())[..., 0].copy()  # type: ignore[no-any-return]

    def costs(self, d: Fields, action: Array) -> Array:
        costs = self.ctrl_weight * _sum(np.square(d["ctrl"]))
        if self.version == 4:
            return costs  # type: ignore[no-any-return]
        contact = self.contact_weight * _sum(_flat(np.square(d["cfrc_ext"])))
        return costs + _clip(contact, *self.contact_range)  # type: ignore[no-any-return]


class HumanoidStandup(Task):
    """HumanoidStandup v4 and v5."""

    contact_forces = True

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.skip = 2 if getattr(env, "_exclude_current_positions_from_observation", True) else 0
        self.body = _HumanoidBody(env, version)
        self.timestep: float = env.model.opt.timestep
        self.ctrl_weight = getattr(env, "_ctrl_cost_weight", 0.1)
        self.impact_weight = getattr(env, "_impact_cost_weight", 0.5e-6)
        self.impact_range = getattr(env, "_impact_cost_range", (-np.inf, 10.0))
        self.derived = ("ctrl", "cfrc_ext", *(p for p in self.body.parts if p != "cfrc_ext"))

    def observe(self, d: Fields) -> Array:
        return self.body.observe(d, self.skip)

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        up = (d["qpos"][..., 2] - 0) / self.timestep
        ctrl = self.ctrl_weight * _sum(np.square(d["ctrl"]))
        impact = self.impact_weight * _sum(_flat(np.square(d["cfrc_ext"])))
        return up - ctrl - _clip(impact, *self.impact_range) + 1, None


class Reacher(Task):
    """Reacher v4 and v5. Version 4 pays for the distance before the step."""

    derived = ("xpos",)

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.tip, self.target = (env.data.body(name).id for name in ("fingertip", "target"))
        self.dist_weight = getattr(env, "_reward_dist_weight", 1)
        self.ctrl_weight = getattr(env, "_reward_control_weight", 1)

    def _to_tip(self, d: Fields) -> Array:
        return d["xpos"][..., self.tip, :] - d["xpos"][..., self.target, :]

    def observe(self, d: Fields) -> Array:
        qpos, theta = d["qpos"], d["qpos"][..., :2]
        to_tip = self._to_tip(d)[..., : 2 if self.version == 5 else 3]
        return np.concatenate((np.cos(theta), np.sin(theta), qpos[..., 2:], d["qvel"][..., :2], to_tip), axis=-1)

    def measure(self, d: Fields) -> Array:
        return _norm(self._to_tip(d))

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        distance = after if self.version == 5 else before
        return -distance * self.dist_weight + -_sum(np.square(action)) * self.ctrl_weight, None

    def draw(self, generator: np.random.Generator) -> tuple[Array, Array]:
        qpos = generator.uniform(-0.1, 0.1, self.init_qpos.size) + self.init_qpos
        goal = generator.uniform(-0.2, 0.2, 2)
        while not np.linalg.norm(goal) < 0.2:
            goal = generator.uniform(-0.2, 0.2, 2)
        qpos[-2:] = goal
        qvel = self.init_qvel + generator.uniform(-0.005, 0.005, self.init_qvel.size)
        qvel[-2:] = 0
        return qpos, qvel


class Pusher(Task):
    """Pusher v5 (version 4 needs MuJoCo 2)."""

    derived = ("xpos",)

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.arm, self.object, self.goal = (env.data.body(name).id for name in ("tips_arm", "object", "goal"))
        self.near_weight, self.dist_weight = env._reward_near_weight, env._reward_dist_weight
        self.ctrl_weight = env._reward_control_weight

    def observe(self, d: Fields) -> Array:
        xpos = d["xpos"]
        bodies = (xpos[..., self.arm, :], xpos[..., self.object, :], xpos[..., self.goal, :])
        return np.concatenate((d["qpos"][..., :7], d["qvel"][..., :7], *bodies), axis=-1)

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        place = d["xpos"][..., self.object, :]
        near = -_norm(place - d["xpos"][..., self.arm, :]) * self.near_weight
        dist = -_norm(place - d["xpos"][..., self.goal, :]) * self.dist_weight
        return dist + -_sum(np.square(action)) * self.ctrl_weight + near, None

    def draw(self, generator: np.random.Generator) -> tuple[Array, Array]:
        qpos = self.init_qpos.copy()
        while True:
            cylinder = np.concatenate((generator.uniform(-0.3, 0, 1), generator.uniform(-0.2, 0.2, 1)))
            if np.linalg.norm(cylinder) > 0.17:
                break
        qpos[-4:-2], qpos[-2:] = cylinder, 0
        qvel = self.init_qvel + generator.uniform(-0.005, 0.005, self.init_qvel.size)
        qvel[-4:] = 0
        return qpos, qvel


class InvertedPendulum(Task):
    """InvertedPendulum v4 and v5."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        finite = _all(np.isfinite(d["qpos"])) & _all(np.isfinite(d["qvel"]))
        terminated = ~finite | (np.abs(d["qpos"][..., 1]) > 0.2)
        return np.ones_like(terminated, np.float64) if self.version == 4 else 1.0 * ~terminated, terminated


class InvertedDoublePendulum(Task):
    """InvertedDoublePendulum v4 and v5."""

    derived = ("site_xpos", "qfrc_constraint")

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.noise = getattr(env, "_reset_noise_scale", 0.1)
        self.always_paid = version == 4
        self.forces = 3 if version == 4 else 1
        self.healthy_reward = getattr(env, "_healthy_reward", 10)

    def draw_velocity(self, generator: np.random.Generator) -> Array:
        return generator.standard_normal(self.init_qvel.size) * self.noise

    def observe(self, d: Fields) -> Array:
        angles = d["qpos"][..., 1:]
        forces = _clip(d["qfrc_constraint"][..., : self.forces], -10, 10)
        return np.concatenate(
            (d["qpos"][..., :1], np.sin(angles), np.cos(angles), _clip(d["qvel"], -10, 10), forces), axis=-1
        )

    def outcome(self, d: Fields, action: Array, before: Array, after: Array) -> tuple[Array, Array | None]:
        # The C library's power, which Gymnasium's scalars get; NumPy's arrays multiply, which rounds otherwise.
        power = np.float_power
        x, y = d["site_xpos"][..., 0, 0], d["site_xpos"][..., 0, 2]
        v1, v2 = d["qvel"][..., 1], d["qvel"][..., 2]
        terminated = y <= 1
        dist_penalty = 0.01 * power(x, 2) + power(y - 2, 2)
        vel_penalty = 1e-3 * power(v1, 2) + 5e-3 * power(v2, 2)
        bonus = self.healthy_reward * (True if self.always_paid else ~terminated)
        return bonus - dist_penalty - vel_penalty, terminated

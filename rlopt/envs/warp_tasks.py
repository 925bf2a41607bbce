"""Gymnasium's MuJoCo tasks of version 5 as torch functions of many rows: observation, reward, end, first state.

``rlopt.envs.warp`` brings the physics. Each class is one of ``gymnasium.envs.mujoco``; weights and ranges are read from
an environment that Gymnasium has built, so every keyword of its constructor means here what it means there.

Shapes: N rows, nq positions, nv velocities, A actuators, D observations, nb bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlopt.envs.streams import RowStreams

Fields = Mapping[str, Tensor]
"""MuJoCo's data by field name, each (N, …); ``cfrc_ext`` is zero at the beginning of an episode."""


class WarpTask:
    """What all tasks have in common.

    Args:
        env: the unwrapped Gymnasium environment whose numbers are used.
        device: where its tensors live.
    """

    derived: tuple[str, ...] = ()
    """Fields that are read beside qpos and qvel."""
    normal_velocities = False
    """Whether the noise on first velocities is normal rather than uniform."""
    caveat = ""
    """What is told before it is used."""

    def __init__(self, env: Any, device: torch.device) -> None:
        self.dt: float = env.dt
        self.init_qpos, self.init_qvel = (
            torch.as_tensor(x, dtype=torch.float32, device=device) for x in (env.init_qpos, env.init_qvel)
        )
        self.noise: float = getattr(env, "_reset_noise_scale", 0.0)
        self.skip = 0
        """Leading positions that the observation leaves out."""

    def observe(self, d: Fields) -> Tensor:
        """Return observations (N, D)."""
        return torch.cat((d["qpos"][:, self.skip :], d["qvel"]), 1)

    def measure(self, d: Fields) -> Tensor:
        """Return the position (N,) whose change is the forward velocity."""
        return d["qpos"][:, 0]

    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return rewards (N,) and terminations (N,), None where the task never ends.

        ``action`` is (N, A); ``velocity`` (N,) the change of ``measure`` per second.
        """
        raise NotImplementedError

    def initial(self, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Return positions (N, nq) and velocities (N, nv) in which episodes begin."""
        qpos = self.init_qpos + streams.uniform(-self.noise, self.noise, len(self.init_qpos))
        nv = len(self.init_qvel)
        if self.normal_velocities:
            return qpos, self.init_qvel + self.noise * streams.normal(nv)
        return qpos, self.init_qvel + streams.uniform(-self.noise, self.noise, nv)


class WarpSwimmer(WarpTask):
    forward_weight: float
    ctrl_weight: float

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.skip = 2 if env._exclude_current_positions_from_observation else 0
        self.forward_weight, self.ctrl_weight = env._forward_reward_weight, env._ctrl_cost_weight

    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.forward_weight * velocity - self.ctrl_weight * action.square().sum(1), None


class WarpHalfCheetah(WarpSwimmer):
    normal_velocities = True

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.skip = 1 if env._exclude_current_positions_from_observation else 0


class WarpWalker2d(WarpHalfCheetah):
    """Tasks that pay for staying healthy and end otherwise."""

    normal_velocities = False
    healthy_reward: float
    z_range: tuple[float, float]

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.healthy_reward, self.terminate = env._healthy_reward, env._terminate_when_unhealthy
        self.z_range = env._healthy_z_range
        self.angle_range = getattr(env, "_healthy_angle_range", None)

    def observe(self, d: Fields) -> Tensor:
        return torch.cat((d["qpos"][:, self.skip :], d["qvel"].clamp(-10.0, 10.0)), 1)

    def healthy(self, d: Fields) -> Tensor:
        """Return which rows are healthy, (N,) bool."""
        return _inside(d["qpos"][:, 1], self.z_range) & _inside(d["qpos"][:, 2], self.angle_range)

    def costs(self, d: Fields, action: Tensor) -> Tensor:
        """Return what the actions cost, (N,)."""
        return self.ctrl_weight * action.square().sum(1)

    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        healthy = self.healthy(d)
        reward = self.forward_weight * velocity + self.healthy_reward * healthy - self.costs(d, action)
        return reward, ~healthy if self.terminate else None


class WarpHopper(WarpWalker2d):
    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.state_range = env._healthy_state_range

    def healthy(self, d: Fields) -> Tensor:
        rest = torch.cat((d["qpos"][:, 2:], d["qvel"]), 1)
        return super().healthy(d) & _inside(rest, self.state_range).all(1)


class WarpAnt(WarpWalker2d):
    derived = ("xpos", "cfrc_ext")
    caveat = "parts from Gymnasium's at its first contacts, where mujoco-warp turns the friction pyramid otherwise"
    normal_velocities = True
    contact_weight: float
    contact_range: tuple[float, float]

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.skip = 2 if env._exclude_current_positions_from_observation else 0
        self.contact_weight, self.contact_range = env._contact_cost_weight, env._contact_force_range
        self.sees_contacts = env._include_cfrc_ext_in_observation
        self.body = env.data.body(env._main_body).id

    def measure(self, d: Fields) -> Tensor:
        return d["xpos"][:, self.body, 0]

    def observe(self, d: Fields) -> Tensor:
        parts = [d["qpos"][:, self.skip :], d["qvel"]]
        if self.sees_contacts:
            parts.append(d["cfrc_ext"][:, 1:].clamp(*self.contact_range).flatten(1))
        return torch.cat(parts, 1)

    def healthy(self, d: Fields) -> Tensor:
        low, high = self.z_range
        finite = torch.cat((d["qpos"], d["qvel"]), 1).isfinite().all(1)
        return finite & (d["qpos"][:, 2] >= low) & (d["qpos"][:, 2] <= high)

    def costs(self, d: Fields, action: Tensor) -> Tensor:
        contact = d["cfrc_ext"].clamp(*self.contact_range).square().sum((1, 2))
        return super().costs(d, action) + self.contact_weight * contact


class _Body:
    """What Humanoid and HumanoidStandup see."""

    def __init__(self, env: Any) -> None:
        self.skip = 2 if env._exclude_current_positions_from_observation else 0
        self.parts = [
            name
            for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
            if getattr(env, f"_include_{name}_in_observation")
        ]

    def observe(self, d: Fields) -> Tensor:
        parts = [d[name][:, 6:] if name == "qfrc_actuator" else d[name][:, 1:].flatten(1) for name in self.parts]
        return torch.cat((d["qpos"][:, self.skip :], d["qvel"], *parts), 1)


class WarpHumanoid(WarpWalker2d):
    derived = ("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    contact_weight: float
    contact_range: tuple[float, float]

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.body = _Body(env)
        self.contact_weight, self.contact_range = env._contact_cost_weight, env._contact_cost_range
        mass = torch.as_tensor(env.model.body_mass, dtype=torch.float32, device=device)
        self.share = mass / mass.sum()

    def measure(self, d: Fields) -> Tensor:
        return d["xipos"][:, :, 0] @ self.share

    def observe(self, d: Fields) -> Tensor:
        return self.body.observe(d)

    def healthy(self, d: Fields) -> Tensor:
        return _inside(d["qpos"][:, 2], self.z_range)

    def costs(self, d: Fields, action: Tensor) -> Tensor:
        contact = self.contact_weight * d["cfrc_ext"].square().sum((1, 2))
        return super().costs(d, action) + contact.clamp(*self.contact_range)


class WarpHumanoidStandup(WarpTask):
    derived = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    ctrl_weight: float
    impact_weight: float
    impact_range: tuple[float, float]

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.body = _Body(env)
        self.up_weight: float = 1.0 / env.model.opt.timestep  # Gymnasium reads its uph_cost_weight, but never uses it
        self.ctrl_weight, self.impact_weight = env._ctrl_cost_weight, env._impact_cost_weight
        self.impact_range = env._impact_cost_range

    def observe(self, d: Fields) -> Tensor:
        return self.body.observe(d)

    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        impact = (self.impact_weight * d["cfrc_ext"].square().sum((1, 2))).clamp(*self.impact_range)
        return self.up_weight * d["qpos"][:, 2] - self.ctrl_weight * action.square().sum(1) - impact + 1.0, None


class WarpInvertedPendulum(WarpTask):
    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        fell = d["qpos"][:, 1].abs() > 0.2
        return 1.0 - fell.to(torch.float32), fell


class WarpInvertedDoublePendulum(WarpTask):
    derived = ("site_xpos", "qfrc_constraint")
    normal_velocities = True

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.healthy_reward: float = env._healthy_reward

    def observe(self, d: Fields) -> Tensor:
        angle = d["qpos"][:, 1:]
        push = d["qfrc_constraint"][:, :1].clamp(-10.0, 10.0)
        return torch.cat((d["qpos"][:, :1], angle.sin(), angle.cos(), d["qvel"].clamp(-10.0, 10.0), push), 1)

    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        x, _, y = d["site_xpos"][:, 0].unbind(1)
        _, v1, v2 = d["qvel"].square().unbind(1)
        fell = y <= 1.0
        distance = 0.01 * x.square() + (y - 2.0).square()
        alive = self.healthy_reward * (~fell).to(torch.float32)
        return alive - distance - (1e-3 * v1 + 5e-3 * v2), fell


class _Arm(WarpTask):
    """Reacher and Pusher: bodies whose distances are paid for."""

    derived = ("xpos",)
    bodies: tuple[str, ...]
    dist_weight: float
    ctrl_weight: float

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.ids = [env.data.body(name).id for name in self.bodies]
        self.dist_weight, self.ctrl_weight = env._reward_dist_weight, env._reward_control_weight

    def place(self, d: Fields, which: int) -> Tensor:
        """Return the place of one of ``bodies``, (N, 3)."""
        return d["xpos"][:, self.ids[which]]

    def gap(self, d: Fields, a: int, b: int) -> Tensor:
        """Return the distance between two of ``bodies``, (N,)."""
        return (self.place(d, a) - self.place(d, b)).square().sum(1).sqrt()

    def slow(self, streams: RowStreams, still: int) -> Tensor:
        """Return first velocities (N, nv), of which the last ``still`` are zero."""
        qvel = self.init_qvel + streams.uniform(-0.005, 0.005, len(self.init_qvel))
        return torch.cat((qvel[:, :-still], torch.zeros_like(qvel[:, -still:])), 1)


class WarpReacher(_Arm):
    bodies = ("fingertip", "target")

    def observe(self, d: Fields) -> Tensor:
        angle = d["qpos"][:, :2]
        gap = (self.place(d, 0) - self.place(d, 1))[:, :2]
        return torch.cat((angle.cos(), angle.sin(), d["qpos"][:, 2:], d["qvel"][:, :2], gap), 1)

    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        return -self.dist_weight * self.gap(d, 0, 1) - self.ctrl_weight * action.square().sum(1), None

    def initial(self, streams: RowStreams) -> tuple[Tensor, Tensor]:
        qpos = self.init_qpos + streams.uniform(-0.1, 0.1, len(self.init_qpos))
        radius, angle = 0.2 * streams.uniform().sqrt(), streams.uniform(0.0, 2.0 * torch.pi)
        goal = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)  # uniform in the disc
        return torch.cat((qpos[:, :-2], goal), 1), self.slow(streams, 2)


class WarpPusher(_Arm):
    bodies = ("tips_arm", "object", "goal")
    TRIES = 32
    """Gymnasium draws until the object is not too near; one draw in 10**13 rows fails 32 times, and is kept."""

    def __init__(self, env: Any, device: torch.device) -> None:
        super().__init__(env, device)
        self.near_weight: float = env._reward_near_weight

    def observe(self, d: Fields) -> Tensor:
        return torch.cat((d["qpos"][:, :7], d["qvel"][:, :7], *(self.place(d, i) for i in range(3))), 1)

    def outcome(self, d: Fields, action: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor | None]:
        near, distance = self.gap(d, 1, 0), self.gap(d, 1, 2)
        cost = self.ctrl_weight * action.square().sum(1)
        return -self.near_weight * near - self.dist_weight * distance - cost, None

    def initial(self, streams: RowStreams) -> tuple[Tensor, Tensor]:
        x, y = streams.uniform(-0.3, 0.0, self.TRIES), streams.uniform(-0.2, 0.2, self.TRIES)
        first = ((x.square() + y.square()).sqrt() > 0.17).to(torch.float32).argmax(1, keepdim=True)
        place = torch.cat((x.gather(1, first), y.gather(1, first)), 1)
        still = self.init_qpos.expand(streams.n, -1)
        return torch.cat((still[:, :-4], place, torch.zeros_like(place)), 1), self.slow(streams, 4)


def _inside(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    assert bounds is not None
    return (x > bounds[0]) & (x < bounds[1])


TASKS: dict[str, type[WarpTask]] = {
    "ant": WarpAnt,
    "half_cheetah": WarpHalfCheetah,
    "hopper": WarpHopper,
    "humanoid": WarpHumanoid,
    "humanoidstandup": WarpHumanoidStandup,
    "inverted_double_pendulum": WarpInvertedDoublePendulum,
    "inverted_pendulum": WarpInvertedPendulum,
    "pusher": WarpPusher,
    "reacher": WarpReacher,
    "swimmer": WarpSwimmer,
    "walker2d": WarpWalker2d,
}
"""By the name of Gymnasium's module."""

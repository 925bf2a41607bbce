"""Gymnasium's classic-control tasks in torch, batched, on any device.

State, reward and termination equal Gymnasium 1.4's in float64, given the same state and (float64) action. The states in
which episodes begin have Gymnasium's law but other draws, because each row has a stream that does not depend on the
device (``rlopt.envs.streams``). Simulator parameters carry the names of Gymnasium's attributes, in lower case.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.streams import RowStreams
from rlopt.envs.torch_env import TorchEnv
from rlopt.types import Space


def _box(*high: float, low: tuple[float, ...] | None = None) -> spaces.Box:
    top = np.array(high, np.float32)
    return spaces.Box(-top if low is None else np.array(low, np.float32), top, dtype=np.float32)


class CartPole(TorchEnv):
    """``CartPole-v1`` (Barto, Sutton, Anderson 1983), Euler steps of 0.02 s. State and observation: (N, 4) position,
    velocity, angle, angular velocity; +1 per step (with ``sutton_barto_reward`` 0, and -1 at a fall)."""

    ANGLE, EDGE, TAU = 12 * 2 * math.pi / 360, 2.4, 0.02
    observation_space = _box(2 * EDGE, math.inf, 2 * ANGLE, math.inf)
    action_space = spaces.Discrete(2)
    episode_limit = 500
    defaults = {
        "gravity": 9.8,
        "masscart": 1.0,
        "masspole": 0.1,
        "length": 0.5,  # half the pole's
        "force_mag": 10.0,
        "sutton_barto_reward": 0.0,
    }

    def initial(self, streams: RowStreams) -> Tensor:
        return streams.uniform(-0.05, 0.05, 4)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = self.parameters
        x, x_dot, theta, theta_dot = state.unbind(1)
        force = torch.where(action == 1, p["force_mag"], -p["force_mag"])
        total_mass, polemass_length = p["masspole"] + p["masscart"], p["masspole"] * p["length"]
        cos, sin = theta.cos(), theta.sin()
        temp = (force + polemass_length * theta_dot.square() * sin) / total_mass
        theta_acc = (p["gravity"] * sin - cos * temp) / (
            p["length"] * (4.0 / 3.0 - p["masspole"] * cos.square() / total_mass)
        )
        x_acc = temp - polemass_length * theta_acc * cos / total_mass
        x, x_dot = x + self.TAU * x_dot, x_dot + self.TAU * x_acc
        theta, theta_dot = theta + self.TAU * theta_dot, theta_dot + self.TAU * theta_acc
        fell = (x.abs() > self.EDGE) | (theta.abs() > self.ANGLE)
        reward = 1.0 - p["sutton_barto_reward"] * (1.0 + fell.to(self.dtype))
        return torch.stack((x, x_dot, theta, theta_dot), 1), reward, fell

    def observe(self, state: Tensor) -> Tensor:
        return state


class Pendulum(TorchEnv):
    """``Pendulum-v1``. State: (N, 2) angle (0 is upright) and angular velocity; observation: (N, 3) cos, sin, velocity;
    torque in [-2, 2]; reward -(θ² + 0.1 θ̇² + 0.001 u²) of the state before the step."""

    SPEED, TORQUE, DT = 8.0, 2.0, 0.05
    observation_space = _box(1.0, 1.0, SPEED)
    action_space = _box(TORQUE)
    episode_limit = 200
    defaults = {"g": 10.0, "m": 1.0, "l": 1.0}

    def initial(self, streams: RowStreams) -> Tensor:
        return torch.stack((streams.uniform(-math.pi, math.pi), streams.uniform(-1.0, 1.0)), 1)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, m, length = (self.parameters[name] for name in ("g", "m", "l"))
        theta, speed = state.unbind(1)
        u = action[:, 0].to(self.dtype).clamp(-self.TORQUE, self.TORQUE)
        angle = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
        cost = angle.square() + 0.1 * speed.square() + 0.001 * u.square()
        speed = speed + (3 * g / (2 * length) * theta.sin() + 3.0 / (m * length.square()) * u) * self.DT
        speed = speed.clamp(-self.SPEED, self.SPEED)
        return torch.stack((theta + speed * self.DT, speed), 1), -cost, torch.zeros_like(u, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        theta, speed = state.unbind(1)
        return torch.stack((theta.cos(), theta.sin(), speed), 1)


class MountainCar(TorchEnv):
    """``MountainCar-v0`` (Moore 1990). State and observation: (N, 2) position and velocity; actions push left, not at
    all, right; -1 per step until the flag at 0.5."""

    LEFT, RIGHT, SPEED, GOAL = -1.2, 0.6, 0.07, 0.5
    observation_space = _box(RIGHT, SPEED, low=(LEFT, -SPEED))
    action_space: Space = spaces.Discrete(3)
    episode_limit = 200
    defaults = {"force": 0.001, "gravity": 0.0025, "goal_velocity": 0.0}

    def initial(self, streams: RowStreams) -> Tensor:
        position = streams.uniform(-0.6, -0.4)
        return torch.stack((position, torch.zeros_like(position)), 1)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity = state.unbind(1)
        pull = (3 * position).cos() * -self.parameters["gravity"]
        state, there = self._move(position, velocity + ((action - 1) * self.parameters["force"] + pull))
        return state, -torch.ones_like(position), there

    def _move(self, position: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after a step at this velocity, and whether the car is at the goal. The left end is a
        wall."""
        velocity = velocity.clamp(-self.SPEED, self.SPEED)
        position = (position + velocity).clamp(self.LEFT, self.RIGHT)
        velocity = torch.where((position == self.LEFT) & (velocity < 0), 0.0, velocity)
        there = (position >= self.GOAL) & (velocity >= self.parameters["goal_velocity"])
        return torch.stack((position, velocity), 1), there

    def observe(self, state: Tensor) -> Tensor:
        return state


class MountainCarContinuous(MountainCar):
    """``MountainCarContinuous-v0``: force in [-1, 1], goal at 0.45, reward 100 at the goal less 0.1 a² per step.

    Gymnasium rounds this task's state to float32 after each step and computes 3·position in float32; so does this.
    """

    GOAL = 0.45
    action_space = _box(1.0)
    episode_limit = 999
    defaults = {"power": 0.0015, "gravity": 0.0025, "goal_velocity": 0.0}

    def initial(self, streams: RowStreams) -> Tensor:
        return super().initial(streams).to(torch.float32).to(self.dtype)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity = state.unbind(1)
        push = action[:, 0].to(self.dtype)
        slope = (3 * position.to(torch.float32)).to(self.dtype).cos()
        velocity = velocity + (push.clamp(-1.0, 1.0) * self.parameters["power"] - self.parameters["gravity"] * slope)
        state, there = self._move(position, velocity)
        reward = torch.where(there, 100.0, 0.0) - push.square() * 0.1
        return state.to(torch.float32).to(self.dtype), reward, there


class Acrobot(TorchEnv):
    """``Acrobot-v1`` (Sutton 1996; the book's equations), one Runge-Kutta step of 0.2 s. State: (N, 4) two angles, two
    angular velocities; observation: (N, 6) their cosines and sines, velocities; -1 per step until the tip is up."""

    SPEED_1, SPEED_2, DT = 4 * math.pi, 9 * math.pi, 0.2
    observation_space = _box(1.0, 1.0, 1.0, 1.0, SPEED_1, SPEED_2)
    action_space = spaces.Discrete(3)
    episode_limit = 500
    defaults = {
        "gravity": 9.8,
        "link_length_1": 1.0,
        "link_mass_1": 1.0,
        "link_mass_2": 1.0,
        "link_com_pos_1": 0.5,
        "link_com_pos_2": 0.5,
        "link_moi": 1.0,
    }

    def initial(self, streams: RowStreams) -> Tensor:
        return streams.uniform(-0.1, 0.1, 4).to(torch.float32).to(self.dtype)  # as Gymnasium rounds it

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torque = (action - 1).to(self.dtype)
        dt, half = self.DT, self.DT / 2
        k1 = self._derivative(state, torque)
        k2 = self._derivative(state + half * k1, torque)
        k3 = self._derivative(state + half * k2, torque)
        k4 = self._derivative(state + dt * k3, torque)
        theta1, theta2, speed1, speed2 = (state + dt / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)).unbind(1)
        theta1, theta2 = _wrap(theta1), _wrap(theta2)
        speed1, speed2 = speed1.clamp(-self.SPEED_1, self.SPEED_1), speed2.clamp(-self.SPEED_2, self.SPEED_2)
        up = -theta1.cos() - (theta2 + theta1).cos() > 1.0
        return torch.stack((theta1, theta2, speed1, speed2), 1), torch.where(up, 0.0, -1.0), up

    def _derivative(self, state: Tensor, torque: Tensor) -> Tensor:
        g, l1, m1, m2, lc1, lc2, moi = (self.parameters[name] for name in self.defaults)
        theta1, theta2, speed1, speed2 = state.unbind(1)
        cos2, sin2 = theta2.cos(), theta2.sin()
        d1 = m1 * lc1**2 + m2 * (l1**2 + lc2**2 + 2 * l1 * lc2 * cos2) + moi + moi
        d2 = m2 * (lc2**2 + l1 * lc2 * cos2) + moi
        phi2 = m2 * lc2 * g * (theta1 + theta2 - math.pi / 2).cos()
        phi1 = (
            -m2 * l1 * lc2 * speed2**2 * sin2
            - 2 * m2 * l1 * lc2 * speed2 * speed1 * sin2
            + (m1 * lc1 + m2 * l1) * g * (theta1 - math.pi / 2).cos()
            + phi2
        )
        acc2 = (torque + d2 / d1 * phi1 - m2 * l1 * lc2 * speed1**2 * sin2 - phi2) / (m2 * lc2**2 + moi - d2**2 / d1)
        acc1 = -(d2 * acc2 + phi1) / d1
        return torch.stack((speed1, speed2, acc1, acc2), 1)

    def observe(self, state: Tensor) -> Tensor:
        theta1, theta2, speed1, speed2 = state.unbind(1)
        return torch.stack((theta1.cos(), theta1.sin(), theta2.cos(), theta2.sin(), speed1, speed2), 1)


def _wrap(angle: Tensor) -> Tensor:
    """Return the angle in [-π, π]; one that is there already keeps its last bit."""
    turns = ((angle.abs() - math.pi) / (2 * math.pi)).ceil().clamp_min(0.0)
    return angle - angle.sign() * turns * (2 * math.pi)


CLASSIC: dict[str, type[TorchEnv]] = {
    "CartPole-v1": CartPole,
    "Pendulum-v1": Pendulum,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Acrobot-v1": Acrobot,
}
"""Gymnasium ids that ``backend=torch`` knows."""

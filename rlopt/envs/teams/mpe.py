"""The cooperative multi-agent particle environments in torch, all rows at once on any device.

They are ``simple_spread_v3``, ``simple_reference_v3`` and ``simple_speaker_listener_v4`` of mpe2 (Lowe et al. 2017;
Mordatch and Abbeel 2017): from equal states equal actions lead to equal states, rewards and observations, in float64.

A row's state is one vector: places (n, 2) and velocities (n, 2) of the agents, places of the landmarks (L, 2), what was
said last (what is left), and numbers of the episode's goals. Everything that an agent sees is one number of it, or one
less another, so that observing is two gathers and a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.streams import RowStreams
from rlopt.envs.torch_env import TorchEnv
from rlopt.joint import join_index, join_spaces
from rlopt.types import Obs, RloptError

_DT, _DAMPING, _SENSITIVITY = 0.1, 0.25, 5.0
_CONTACT_FORCE, _CONTACT_MARGIN = 100.0, 1e-3
_ZERO = -1
"""In a view, no number at all: the state's last entry, which is 0."""


class ParticleEnv(TorchEnv):
    """Agents that move on a plane, and may speak.

    Args:
        num_envs: N.
        continuous_actions: whether agents act in Box(0, 1, …), a force for each direction and what they say, and not in
            Discrete: one of five moves (none, left, right, down, up), times what they say.
        options: of ``TorchEnv``.
    """

    episode_limit = 25
    landmarks = 3
    said: tuple[int, ...]
    """How many words each agent has; 0 for silent ones."""
    moves: tuple[bool, ...]
    """Which agents move."""
    goals = 0
    """How many numbers of the state are the episode's goals."""

    def __init__(self, num_envs: int, *, continuous_actions: bool = False, **options: Any) -> None:
        self.continuous = bool(continuous_actions)
        n, lm = len(self.agents), self.landmarks
        self.reward_shape = (n,)
        self._velocity, self._landmark, self._spoken = 2 * n, 4 * n, 4 * n + 2 * lm
        self._goal = self._spoken + sum(self.said)
        self._size = self._goal + self.goals + 1
        views = self.views()
        own = [(spaces.Box(-np.inf, np.inf, (len(view),)), self._acts(i)) for i, view in enumerate(views)]
        self.agent_spaces = own
        every, index = sum(map(len, views)), join_index([(len(view),) for view in views])
        self.observation_space, self.action_space = join_spaces(own, spaces.Box(-np.inf, np.inf, (every,)))
        self.derived = {"obs": index}
        super().__init__(num_envs, **options)
        pairs = [(pair if isinstance(pair, tuple) else (pair, _ZERO)) for view in views for pair in view]
        self._shown, self._less = (torch.tensor(pairs, device=self.device) % self._size).unbind(1)
        self._padded = bool((index < 0).any())
        self._index = torch.from_numpy(np.where(index < 0, every, index)).to(self.device).reshape(-1)
        self._blank = torch.zeros(num_envs, 1, dtype=self.dtype, device=self.device)
        self._never = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self._movable = torch.tensor(self.moves, dtype=self.dtype, device=self.device)[:, None]
        self._pushes = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], dtype=self.dtype, device=self.device)

    # What a task defines

    def views(self) -> list[list[int | tuple[int, int]]]:
        """Return what each agent sees: places in the state, or pairs of which the second is subtracted."""
        raise NotImplementedError

    def draw_goals(self, streams: RowStreams, landmarks: Tensor) -> Tensor:
        """Return numbers (N, goals) of an episode's goals; ``landmarks`` are (N, L, 2)."""
        raise NotImplementedError

    def paid(self, place: Tensor, state: Tensor) -> Tensor:
        """Return rewards (N, n) of places (N, n, 2) and the state (N, D)."""
        raise NotImplementedError

    def contact(self, place: Tensor) -> Tensor | None:
        """Return forces (N, n, n, 2) of agents on agents; None where they pass through each other."""
        return None

    # The contract

    def _acts(self, i: int) -> spaces.Space[Any]:
        if self.continuous:
            return spaces.Box(0.0, 1.0, (5 * self.moves[i] + self.said[i],))
        return spaces.Discrete((5 if self.moves[i] else 1) * (self.said[i] or 1))

    def initial(self, streams: RowStreams) -> Tensor:
        n, lm = len(self.agents), self.landmarks
        drawn = streams.uniform(-1.0, 1.0, 2 * (n + lm))
        place, landmarks = drawn[:, : 2 * n], drawn[:, 2 * n :]
        still = torch.zeros_like(place)
        parts = [place, still, landmarks, self._blank.expand(-1, self._goal - self._spoken)]
        if self.goals:
            parts.append(self.draw_goals(streams, landmarks.view(-1, lm, 2)))
        return torch.cat([*parts, self._blank], 1)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self.agents)
        place, velocity = state[:, : 2 * n].view(-1, n, 2), state[:, 2 * n : 4 * n].view(-1, n, 2)
        force, words = self._intended(action)
        pushed = self.contact(place)
        if pushed is not None:
            for j in range(n):  # one after the other, as the reference adds them
                force = force + pushed[:, :, j]
        place = place + velocity * _DT
        velocity = velocity * (1 - _DAMPING) + force * _DT
        parts = [place.flatten(1), velocity.flatten(1), state[:, self._landmark : self._spoken], *words]
        after = torch.cat([*parts, state[:, self._goal :]], 1)
        return after, self.paid(place, after), self._never

    def _intended(self, action: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the forces (N, n, 2) that the agents apply, and their words, (N, words) of each that speaks."""
        if self.continuous:
            action = action.clamp(0.0, 1.0)
            force = action[..., 2:5:2] - action[..., 1:4:2]  # right less left, up less down
            force = force.to(self.dtype) * _SENSITIVITY
            first = [5 * moves for moves in self.moves]
            words = [action[:, i, k : k + size] for i, (k, size) in enumerate(zip(first, self.said, strict=True))]
            found = [word.to(self.dtype) for word in words if word.shape[1]]
        else:
            force = self._pushes[action % 5] * _SENSITIVITY
            # The first move varies fastest; who cannot move says its action.
            spoken = [(action[:, i] // (5 if moves else 1), size) for i, (moves, size) in self._speakers()]
            found = [torch.nn.functional.one_hot(word, size).to(self.dtype) for word, size in spoken]
        if not all(self.moves):
            force = force * self._movable
        return force, found

    def _speakers(self) -> list[tuple[int, tuple[bool, int]]]:
        return [(i, pair) for i, pair in enumerate(zip(self.moves, self.said, strict=True)) if pair[1]]

    def observe(self, state: Tensor) -> Obs:
        seen = state.index_select(1, self._shown) - state.index_select(1, self._less)
        shape = (self.num_envs, len(self.agents), -1)
        obs = torch.cat((seen, self._blank), 1).index_select(1, self._index) if self._padded else seen
        return {"obs": obs.view(shape), "state": seen}

    def _place(self, i: int) -> list[int]:
        return [2 * i, 2 * i + 1]

    def _relative(self, i: int, targets: Sequence[int]) -> list[int | tuple[int, int]]:
        """Return places of ``targets`` (of their first coordinates in the state) as agent i sees them."""
        return [(target + axis, 2 * i + axis) for target in targets for axis in range(2)]

    def _landmarks_of(self, i: int) -> list[int | tuple[int, int]]:
        return self._relative(i, range(self._landmark, self._spoken, 2))

    def _speed(self, i: int) -> list[int]:
        return [self._velocity + 2 * i, self._velocity + 2 * i + 1]


class Spread(ParticleEnv):
    """N agents that should cover N landmarks and not collide: ``simple_spread_v3``.

    Agent i is paid ``1 − local_ratio`` times the sum over landmarks of minus the distance of the nearest agent, and
    ``local_ratio`` times minus its collisions.

    Args:
        num_envs: rows.
        N: how many agents there are, and landmarks.
        local_ratio: see above, in [0, 1].
        options: of ``ParticleEnv``.

    Raises:
        RloptError: a number out of range.
    """

    _diameter = 0.3

    def __init__(self, num_envs: int, *, N: int = 3, local_ratio: float = 0.5, **options: Any) -> None:
        if not (isinstance(N, int) and N >= 1 and 0.0 <= local_ratio <= 1.0):
            raise RloptError(f"N={N} must be a whole number above 0, and local_ratio={local_ratio} in [0, 1]")
        self.agents = tuple(f"agent_{i}" for i in range(N))
        self.landmarks, self.local_ratio = N, local_ratio
        self.said, self.moves = (0,) * N, (True,) * N
        super().__init__(num_envs, **options)
        self._itself = torch.eye(N, dtype=self.dtype, device=self.device)

    def views(self) -> list[list[int | tuple[int, int]]]:
        n = len(self.agents)
        return [
            [
                *self._speed(i), *self._place(i), *self._landmarks_of(i),
                *self._relative(i, [2 * j for j in range(n) if j != i]), *[_ZERO] * (2 * (n - 1)),
            ]
            for i in range(n)
        ]  # fmt: skip

    def contact(self, place: Tensor) -> Tensor:
        apart, distance = self._distances(place)
        # log(1 + exp(x)), a force that grows where two overlap.
        depth = -(distance - self._diameter) / _CONTACT_MARGIN
        depth = torch.logaddexp(torch.zeros_like(depth), depth) * _CONTACT_MARGIN
        return _CONTACT_FORCE * apart / distance[..., None] * depth[..., None]

    def _distances(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, n, n, 2) from the second to the first agent, and how far that is, 1 from an agent to itself."""
        apart = place[:, :, None] - place[:, None]
        return apart, _length(apart) + self._itself

    def paid(self, place: Tensor, state: Tensor) -> Tensor:
        n = len(self.agents)
        landmarks = state[:, self._landmark : self._spoken].view(-1, n, 2)
        nearest = _length(place[:, :, None] - landmarks[:, None]).amin(1)
        covered = nearest[:, 0]
        for k in range(1, n):
            covered = covered + nearest[:, k]
        collisions = (self._distances(place)[1] < self._diameter).sum(-1).to(self.dtype)
        together = -covered * (1 - self.local_ratio)
        return together[:, None] - collisions * self.local_ratio


class Reference(ParticleEnv):
    """Two agents, each of which knows to which landmark the other should go, and can tell it: ``simple_reference_v3``.

    Agent i is paid ``1 − local_ratio`` times the mean over agents of minus the distance to their landmark, and
    ``local_ratio`` times that of the other agent, whose goal it knows.

    Args:
        num_envs: rows.
        local_ratio: see above, in [0, 1].
        options: of ``ParticleEnv``.

    Raises:
        RloptError: ``local_ratio`` is out of range.
    """

    agents = ("agent_0", "agent_1")
    said, moves, goals = (10, 10), (True, True), 10
    colors = ((0.75, 0.25, 0.25), (0.25, 0.75, 0.25), (0.25, 0.25, 0.75))

    def __init__(self, num_envs: int, *, local_ratio: float = 0.5, **options: Any) -> None:
        if not 0.0 <= local_ratio <= 1.0:
            raise RloptError(f"local_ratio={local_ratio} must be in [0, 1]")
        self.local_ratio = local_ratio
        super().__init__(num_envs, **options)
        self._colors = torch.tensor(self.colors, dtype=self.dtype, device=self.device)

    def views(self) -> list[list[int | tuple[int, int]]]:
        return [
            [
                *self._speed(i), *self._landmarks_of(i), *range(self._goal + 3 * i, self._goal + 3 * i + 3),
                *range(self._spoken + 10 * (1 - i), self._spoken + 10 * (1 - i) + 10),
            ]
            for i in range(2)
        ]  # fmt: skip

    def draw_goals(self, streams: RowStreams, landmarks: Tensor) -> Tensor:
        chosen = (streams.uniform(0.0, self.landmarks, 2)).to(torch.int64)
        return torch.cat((self._colors[chosen].flatten(1), _rows(landmarks, chosen).flatten(1)), 1)

    def paid(self, place: Tensor, state: Tensor) -> Tensor:
        goal = state[:, self._goal + 6 : self._goal + 10].view(-1, 2, 2)
        own = -_length(place.flip(1) - goal)
        together = (own[:, 0] + own[:, 1]) / 2
        return together[:, None] * (1 - self.local_ratio) + own * self.local_ratio


class SpeakerListener(ParticleEnv):
    """A speaker that knows the landmark to which a listener should go: ``simple_speaker_listener_v4``.

    Both are paid minus the squared distance.

    Args:
        num_envs: rows.
        options: of ``ParticleEnv``.
    """

    agents = ("speaker_0", "listener_0")
    said, moves, goals = (3, 0), (False, True), 5
    colors = ((0.65, 0.15, 0.15), (0.15, 0.65, 0.15), (0.15, 0.15, 0.65))

    def __init__(self, num_envs: int, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self._colors = torch.tensor(self.colors, dtype=self.dtype, device=self.device)

    def views(self) -> list[list[int | tuple[int, int]]]:
        listener = [*self._speed(1), *self._landmarks_of(1), *range(self._spoken, self._goal)]
        return [list(range(self._goal, self._goal + 3)), listener]

    def draw_goals(self, streams: RowStreams, landmarks: Tensor) -> Tensor:
        chosen = streams.uniform(0.0, self.landmarks, 1).to(torch.int64)
        return torch.cat((self._colors[chosen].flatten(1), _rows(landmarks, chosen).flatten(1)), 1)

    def paid(self, place: Tensor, state: Tensor) -> Tensor:
        apart = place[:, 1] - state[:, self._goal + 3 : self._goal + 5]
        far = -(apart[:, :1].square() + apart[:, 1:].square())
        return far.expand(-1, 2)


def _length(x: Tensor) -> Tensor:
    """(…, 2) → (…,)."""
    return (x[..., 0].square() + x[..., 1].square()).sqrt()


def _rows(x: Tensor, chosen: Tensor) -> Tensor:
    """Return the rows (N, k, 2) of (N, L, 2) that ``chosen`` (N, k) names."""
    return x.gather(1, chosen[..., None].expand(-1, -1, 2))

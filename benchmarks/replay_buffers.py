"""The replay buffers that ``replay.py`` measures: rlopt's and other libraries', filled with the same transitions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

OBS, ACT, ENVS, POOL, BLOCKS = 17, 6, 64, 4096, 64


class Data:
    """Random transitions: ``capacity`` of them to fill buffers with, and new priorities for every minibatch."""

    def __init__(self, capacity: int, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.capacity, self.batch = capacity, batch
        self.obs = rng.standard_normal((capacity, OBS), dtype=np.float32)
        self.next_obs = rng.standard_normal((capacity, OBS), dtype=np.float32)
        self.action = rng.uniform(-1, 1, (capacity, ACT)).astype(np.float32)
        self.reward = rng.standard_normal(capacity, dtype=np.float32)
        self.done = rng.random(capacity) < 0.001
        self.error = np.abs(rng.standard_normal((POOL, batch), dtype=np.float32))

    def blocks(self, envs: int, make: Callable[[slice], Any]) -> list[Any]:
        """``BLOCKS`` different additions of ``envs`` transitions, made ready before anything is timed."""
        return [make(slice(i, i + envs)) for i in range(0, BLOCKS * envs, envs)]


class Buffer(NamedTuple):
    """One full buffer: what is timed."""

    draw: Callable[[int], Any]
    """The i-th draw, with its update."""
    add: Callable[[int], Any]
    """The i-th addition of as many transitions as the buffer has environments."""
    sync: Callable[[], Any] = lambda: None


class Contender(NamedTuple):
    library: str
    sampler: str
    kind: str
    """Whom it is compared with: ``uniform`` or ``prioritised``."""
    make: Callable[[Data, int], Buffer]
    """A full buffer for this many environments."""


# --- Stable-Baselines3 ----------------------------------------------------------------------------------------------


def make_sb3(data: Data, envs: int) -> Buffer:
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    observation, action = spaces.Box(-np.inf, np.inf, (OBS,), np.float32), spaces.Box(-1, 1, (ACT,), np.float32)
    buffer = ReplayBuffer(data.capacity, observation, action, device="cpu", n_envs=envs)
    rows = buffer.buffer_size
    buffer.observations[:] = data.obs[: rows * envs].reshape(rows, envs, OBS)
    buffer.next_observations[:] = data.next_obs[: rows * envs].reshape(rows, envs, OBS)
    buffer.actions[:] = data.action[: rows * envs].reshape(rows, envs, ACT)
    buffer.rewards[:] = data.reward[: rows * envs].reshape(rows, envs)
    buffer.dones[:], buffer.timeouts[:], buffer.full = 0, 0, True
    infos: list[dict[str, Any]] = [{} for _ in range(envs)]
    fields = (data.obs, data.next_obs, data.action, data.reward, data.done)
    blocks = data.blocks(envs, lambda s: tuple(x[s] for x in fields))
    return Buffer(lambda i: buffer.sample(data.batch), lambda i: buffer.add(*blocks[i % BLOCKS], infos))


# --- cpprb ----------------------------------------------------------------------------------------------------------


def make_cpprb(prioritised: bool) -> Callable[[Data, int], Buffer]:
    def make(data: Data, envs: int) -> Buffer:
        import cpprb

        fields = {"obs": {"shape": OBS}, "act": {"shape": ACT}, "rew": {}, "next_obs": {"shape": OBS}, "done": {}}
        buffer = (cpprb.PrioritizedReplayBuffer if prioritised else cpprb.ReplayBuffer)(data.capacity, fields)

        def block(s: slice) -> dict[str, Any]:
            now = {"obs": data.obs[s], "act": data.action[s], "rew": data.reward[s]}
            return {**now, "next_obs": data.next_obs[s], "done": data.done[s]}

        buffer.add(**block(slice(0, data.capacity)))
        blocks = data.blocks(envs, block)

        def add(i: int) -> None:
            buffer.add(**blocks[i % BLOCKS])

        if not prioritised:
            return Buffer(lambda i: buffer.sample(data.batch), add)
        for i in range(data.capacity // data.batch):
            index = np.arange(i * data.batch, (i + 1) * data.batch)
            buffer.update_priorities(index, data.error[i % POOL])

        def draw(i: int) -> None:
            batch = buffer.sample(data.batch, 0.4)
            buffer.update_priorities(batch["indexes"], data.error[i % POOL])

        return Buffer(draw, add)

    return make


# --- TorchRL --------------------------------------------------------------------------------------------------------


def make_torchrl(prioritised: bool) -> Callable[[Data, int], Buffer]:
    def make(data: Data, envs: int) -> Buffer:
        import torch
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer
        from torchrl.data.replay_buffers.samplers import RandomSampler

        logging.getLogger("torchrl").setLevel(logging.WARNING)
        # Raises where TorchRL's compiled sum-tree does not fit this torch.
        sampler = PrioritizedSampler(data.capacity, 0.6, 0.4) if prioritised else RandomSampler()
        storage = LazyTensorStorage(data.capacity)
        buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=data.batch)

        def block(s: slice) -> TensorDict:
            following = {
                "observation": torch.from_numpy(data.next_obs[s]),
                "reward": torch.from_numpy(data.reward[s])[:, None],
                "done": torch.from_numpy(data.done[s])[:, None],
                "terminated": torch.from_numpy(data.done[s])[:, None],
            }
            now = {"observation": torch.from_numpy(data.obs[s]), "action": torch.from_numpy(data.action[s])}
            count = len(now["observation"])
            return TensorDict({**now, "next": TensorDict(following, [count])}, [count])

        for i in range(0, data.capacity, 10_000):
            buffer.extend(block(slice(i, min(i + 10_000, data.capacity))))

        def draw(i: int) -> None:
            batch = buffer.sample()
            if prioritised:
                buffer.update_priority(batch["index"], torch.from_numpy(data.error[i % POOL]))

        blocks = data.blocks(envs, block)
        return Buffer(draw, lambda i: buffer.extend(blocks[i % BLOCKS]))

    return make


# --- Tianshou -------------------------------------------------------------------------------------------------------


def make_tianshou(prioritised: bool) -> Callable[[Data, int], Buffer]:
    def make(data: Data, envs: int) -> Buffer:
        from tianshou import data as tianshou

        options = {"alpha": 0.6, "beta": 0.4} if prioritised else {}
        if envs == 1:
            name = "PrioritizedReplayBuffer" if prioritised else "ReplayBuffer"
            buffer: Any = getattr(tianshou, name)(data.capacity, **options)
        else:
            name = "PrioritizedVectorReplayBuffer" if prioritised else "VectorReplayBuffer"
            buffer = getattr(tianshou, name)(data.capacity, envs, **options)
        never = np.zeros(data.capacity, dtype=bool)

        def block(s: slice) -> Any:
            names = ("obs", "act", "rew", "obs_next", "terminated", "truncated")
            fields = (data.obs, data.action, data.reward, data.next_obs, data.done, never)
            rows = {name: x[s] if envs > 1 else x[s.start] for name, x in zip(names, fields, strict=True)}
            return tianshou.Batch(**rows)

        blocks = data.blocks(envs, block)

        def add(i: int) -> None:
            buffer.add(blocks[i % BLOCKS])

        # Row by row would take minutes: the arrays that the first addition makes are filled directly.
        add(0)
        stored, held = buffer._meta, buffer.maxsize
        stored.obs[:], stored.act[:], stored.obs_next[:] = data.obs[:held], data.action[:held], data.next_obs[:held]
        stored.rew[:], stored.terminated[:], stored.done[:] = data.reward[:held], data.done[:held], data.done[:held]
        for part in buffer.buffers if envs > 1 else [buffer]:
            part._size = part.maxsize
        if envs > 1:
            buffer._lengths[:] = [part.maxsize for part in buffer.buffers]
        if not prioritised:
            return Buffer(lambda i: buffer.sample(data.batch), add)
        for i in range(data.capacity // data.batch):
            buffer.update_weight(np.arange(i * data.batch, (i + 1) * data.batch), data.error[i % POOL])

        def draw(i: int) -> None:
            _, index = buffer.sample(data.batch)
            buffer.update_weight(index, data.error[i % POOL])

        return Buffer(draw, add)

    return make


# --- rlopt ----------------------------------------------------------------------------------------------------------


def make_rlopt(sampler: str, device: str) -> Callable[[Data, int], Buffer]:
    def make(data: Data, envs: int) -> Buffer:
        import torch
        from gymnasium import spaces

        import rlopt.buffers

        observation, action = spaces.Box(-np.inf, np.inf, (OBS,), np.float32), spaces.Box(-1, 1, (ACT,), np.float32)
        chosen = getattr(rlopt.buffers, sampler)()
        buffer = rlopt.buffers.ReplayBuffer(
            data.capacity, observation, action, num_envs=envs, sampler=chosen, device=device
        )
        obs, next_obs, actions, reward, done = (
            torch.from_numpy(x).to(device) for x in (data.obs, data.next_obs, data.action, data.reward, data.done)
        )
        never = torch.zeros(envs, dtype=torch.bool, device=device)
        error = torch.from_numpy(data.error).to(device)
        fields = (obs, actions, reward, next_obs, done)
        blocks = data.blocks(envs, lambda s: (*(x[s] for x in fields), never))

        def add(i: int) -> None:
            buffer.add(*blocks[i % BLOCKS])

        # As for the others, the rows are filled directly; the sampler hears of them as of any others.
        add(0)
        rows = buffer.storage.held("obs", buffer.capacity_rows).shape[0]
        packed = buffer.block.view(rows * envs, -1)
        values = {"obs": obs, "next_obs": next_obs, "action": actions, "reward": reward[:, None]}
        values |= {name: done[:, None].float() for name in ("terminated", "ended")}
        for name, value in values.items():
            packed[:, buffer.slices[name]] = value[: rows * envs]
        packed[:, buffer.slices["valid"]] = 1.0
        buffer.rows_written = rows
        chosen.wrote(0, rows * envs, None)
        for i in range(data.capacity // data.batch):
            buffer.update_priority(torch.arange(i * data.batch, (i + 1) * data.batch, device=device), error[i % POOL])

        def draw(i: int) -> None:
            batch = buffer.sample(data.batch)
            buffer.update_priority(batch.index, error[i % POOL])

        return Buffer(draw, add, torch.cuda.synchronize if device == "cuda" else lambda: None)

    return make


RLOPT = {
    "uniform": ("UniformSampler", "uniform"),
    "RR-C": ("ReshuffledSampler", "uniform"),
    "PER": ("PrioritizedSampler", "prioritised"),
    "LAP": ("LAPSampler", "prioritised"),
    "RR-M": ("PrioritizedReshuffledSampler", "prioritised"),
}


def contenders(device: str) -> list[Contender]:
    own = [Contender("rlopt", name, kind, make_rlopt(s, device)) for name, (s, kind) in RLOPT.items()]
    if device != "cpu":
        return own
    return [
        Contender("Stable-Baselines3", "uniform", "uniform", make_sb3),
        Contender("cpprb", "uniform", "uniform", make_cpprb(False)),
        Contender("TorchRL", "uniform", "uniform", make_torchrl(False)),
        Contender("Tianshou", "uniform", "uniform", make_tianshou(False)),
        *own[:2],
        Contender("cpprb", "PER", "prioritised", make_cpprb(True)),
        Contender("TorchRL", "PER", "prioritised", make_torchrl(True)),
        Contender("Tianshou", "PER", "prioritised", make_tianshou(True)),
        *own[2:],
    ]

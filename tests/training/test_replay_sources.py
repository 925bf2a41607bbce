"""What a replay loop can draw for an update: slices with a stored carry, several minibatches, transformed rewards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlopt.agents.sac import SAC, SACConfig
from rlopt.buffers import (
    Batch,
    PrioritizedSampler,
    ReplayBuffer,
    ReshuffledSampler,
    SequenceSampler,
    UniformSampler,
    slice_priority,
)
from rlopt.envs import Normalizer, make_env
from rlopt.loops.replay import ReplayLoop
from rlopt.nn import NetworkConfig
from rlopt.registry import AGENTS
from rlopt.state import states_equal
from rlopt.training import train_config
from rlopt.training.setup import make_loop, resolve_config
from rlopt.types import Act, Carry, Obs, RloptError, Update

N = 2
PPO = {"name": "ppo", "rollout_steps": 8, "batch_size": 4}


class Remembers(SAC):
    """Its carry counts the rows of an episode; it learns from the first step of each slice that the loss counts."""

    name = "remembers"
    supports_memory = True
    extra_fields = {"carry/count": ((), torch.int64)}

    def initial_carry(self, rows: int = 1) -> Carry:
        return {"count": torch.zeros(rows, dtype=torch.int64)}

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        assert carry is not None
        return super().act(obs, deterministic=deterministic)._replace(carry={"count": carry["count"] + 1})

    def update(self, batch: Batch) -> Update:
        self.seen = batch
        assert batch.mask is not None and batch.carry is not None and isinstance(batch.obs, Tensor)
        assert torch.equal(batch.carry["count"], count_of(batch.obs[:, 0]))
        rows, first = torch.arange(len(batch.mask)), batch.mask.argmax(1)
        self.learnt = first
        one = batch.map(lambda x: x[rows, first] if x.ndim > 1 else x)
        update = super().update(one._replace(weight=batch.weight, index=batch.index, carry=None, valid=None, mask=None))
        return update._replace(priority=slice_priority(batch.reward, batch.mask))


def count_of(obs: Tensor) -> Tensor:
    """The environment shows how many steps its episode has made."""
    return obs[..., 0].long()


class Divides(SAC):
    """Draws everything, and apart from that what it called for."""

    name = "divides"
    extra_fields = {"called": ((), torch.bool)}
    draws = {"all": None, "called": "called"}

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        act = super().act(obs, deterministic=deterministic)
        assert isinstance(obs, Tensor)
        return act._replace(extras={"called": count_of(obs) % 3 == 1})

    def update(self, batch: dict[str, Batch]) -> Update:  # type: ignore[override]
        self.seen = batch
        update = super().update(batch["all"])
        return update._replace(priority={name: each.reward for name, each in batch.items()})


def loop_of(options: dict[str, Any]) -> Any:
    return make_loop(resolve_config(train_config(options)))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Remembers, Divides):
        monkeypatch.setitem(AGENTS, cls.name, cls)


def make(cls: Any, sampler: Any, seed: int = 0, normalized: bool = False, **options: Any) -> ReplayLoop:
    env = make_env("rlopt.envs.counting:rlopt/Count-v0", N, seed=seed, backend="sync", kwargs={"length": 7})
    config = SACConfig(fused=False, batch_size=6, warmup_steps=8, network=NetworkConfig(hidden=(8,)))
    agent = cls(env.spec, config, seed=seed)
    buffer = ReplayBuffer(
        40, env.spec.observation_space, env.spec.action_space, N, sampler, extra_fields=agent.extra_fields, seed=seed,
        masks={"called": "called"} if agent.draws else None,
    )  # fmt: skip
    normalizer = Normalizer(env.spec, reward=False) if normalized else None
    return ReplayLoop(agent, env, buffer, 10_000, normalizer=normalizer, seed=seed, **options)


def slices() -> SequenceSampler:
    return SequenceSampler(PrioritizedSampler(), 4, burn_in=1)


def both() -> dict[str, Any]:
    return {"all": ReshuffledSampler(), "called": UniformSampler()}


def test_slices_come_with_the_carry_that_was_stored() -> None:
    """Through ends of episodes and of the ring; ``update`` compares every carry with the environment's count."""
    loop = make(Remembers, slices())
    for _ in range(40):
        loop.advance()
    batch = loop.agent.seen
    assert loop.agent.clock.updates == 2 * 36 and batch.reward.shape == (6, 4)
    assert set(loop.agent.learnt.tolist()) == {0, 1}  # an episode's first step has no burn-in before it
    for row in range(6):
        steps = count_of(batch.obs[row])[batch.valid[row] > 0]
        assert steps.tolist() == list(range(int(steps[0]), int(steps[0]) + len(steps)))


def test_an_update_may_draw_several_minibatches() -> None:
    loop = make(Divides, both(), normalized=False)
    for _ in range(40):
        loop.advance()
    batches = loop.agent.seen
    assert batches.keys() == {"all", "called"}
    assert set((count_of(batches["called"].obs) % 3).tolist()) == {1}
    assert len(set((count_of(batches["all"].obs) % 3).tolist())) > 1


def test_updates_that_are_more_than_their_stages_are_not_recorded() -> None:
    """Those of slices that are stages alone are, in ``tests/agents/test_sequences.py``."""
    with pytest.raises(RloptError, match=r"update_mode=captured cannot be: the updates of agent=remembers are more"):
        make(Remembers, slices(), update_mode="captured")


@pytest.mark.parametrize(("cls", "sampler"), [(Remembers, slices), (Divides, both)])
def test_a_resumed_loop_goes_on_exactly(cls: Any, sampler: Any) -> None:
    loop, back = make(cls, sampler()), make(cls, sampler())
    for _ in range(25):
        loop.advance()
    state = loop.state_dict()
    back.load_state_dict(state)
    for name, log in back.row_logs().items():
        log.write_rows(5, loop.row_logs()[name].read_rows(5, 25))
    back.rows_restored()
    for _ in range(12):
        loop.advance()
        back.advance()
    assert states_equal(loop.state_dict(), back.state_dict()) is None


@pytest.mark.usefixtures("counting")
def test_the_words_of_the_command_line() -> None:
    common = {
        "env": {"id": "Pendulum-v1"}, "num_envs": 2, "eval": {"every": None},
        "buffer": {"name": "prioritized", "capacity": 100, "sequence_length": 5, "burn_in": 2},
    }  # fmt: skip
    loop = loop_of({**common, "agent": {"name": "remembers", "reward": "sign"}})
    assert isinstance(loop, ReplayLoop) and isinstance(loop.buffer.sampler, SequenceSampler)
    assert (loop.buffer.sampler.length, loop.buffer.sampler.burn_in) == (5, 2)
    assert loop.buffer.transformed(torch.tensor([-3.0, 0.5])).tolist() == [-1, 1]
    loop.close()
    with pytest.raises(RloptError, match=r"buffer\.sequence_length=5: agent=sac learns from single transi"):
        loop_of({**common, "agent": {"name": "sac"}})
    loop = loop_of({**common, "buffer": {"name": "lap", "capacity": 100}, "agent": {"name": "divides"}})
    assert isinstance(loop, ReplayLoop) and loop.buffer.samplers.keys() == {"all", "called"}
    loop.close()
    env = {"id": "Pendulum-v1", "normalize_reward": True}
    with pytest.raises(RloptError, match=r"agent\.reward=clip and env\.normalize_reward .* choose one"):
        loop_of({"env": env, "agent": {"name": "sac", "reward": "clip"}})


@pytest.mark.parametrize("agent", [{"name": "reinforce", "groups": 1, "group_size": 2, "horizon": 4}, PPO])
@pytest.mark.parametrize(("word", "made"), [("raw", 3.0), ("sign", 1.0)])
def test_rollouts_are_learnt_from_as_the_option_says(
    agent: dict[str, Any], word: str, made: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes keep raw rewards."""
    seen: list[Tensor] = []
    config = {"env": {"id": "CartPole-v1", "kwargs": {"max_episode_steps": 4}}, "agent": {**agent, "reward": word}}
    loop = loop_of({**config, "eval": {"every": None}})
    monkeypatch.setattr(loop.agent, "update", lambda rollout: seen.append(rollout.reward) or Update({}))
    step_of = loop.env.step  # type: ignore[union-attr]

    def tripled(action: Tensor) -> Any:
        step = step_of(action)
        return step._replace(reward=3 * step.reward)

    monkeypatch.setattr(loop.env, "step", tripled)
    episodes = []
    while not seen:
        episodes += loop.advance().episodes
    assert seen[0].unique().tolist() == [made] and {e.total_reward for e in episodes} == {12.0}
    loop.close()

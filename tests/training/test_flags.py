"""What the flags of a step mean: one test for each cell of the table in ``rlopt.envs.vector.VectorEnv``.

Every case is the second of five rows of one environment, between ordinary ones; the fourth ends for good. Their rewards
are 1, 2, 4, 8, 16, so that a sum tells which rows are in it; rows that are no transition pay nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.group import returns_to_go
from rlopt.agents.ppo import PPO, PPOConfig
from rlopt.agents.reinforce import Reinforce, ReinforceConfig
from rlopt.agents.sac_discrete import DiscreteSAC, DiscreteSACConfig
from rlopt.buffers import ReplayBuffer, Rollout, SequenceSampler, UniformSampler
from rlopt.envs import Normalizer
from rlopt.loops.episodes import EpisodeCounter
from rlopt.loops.evaluation import run_episodes
from rlopt.loops.group import GroupLoop
from rlopt.loops.parameter_box import ParameterBox, Simulator
from rlopt.loops.replay import ReplayLoop
from rlopt.loops.rollout import RolloutLoop
from rlopt.nn import NetworkConfig
from rlopt.policy import Policy
from rlopt.types import Act, Carry, EnvSpec, Obs, Step, Update, map_obs

SPEC = EnvSpec("Script-v0", spaces.Box(-9.0, 99.0, (1,)), spaces.Discrete(2))
GAMMA = 0.5
NO = torch.zeros(1, dtype=torch.bool)


@dataclass(frozen=True)
class Case:
    """A row of the table, and what each reader must make of it."""

    terminated: int
    truncated: int
    ended: int
    valid: int
    episodes: list[tuple[float, int]]
    """Returns and lengths that are counted."""
    window: tuple[float, float, float]
    """Of the first row: the 3-step return, its discount, and whether the bootstrap is cut."""
    slice: list[float]
    """Rewards of the slice that begins with the first row."""
    carry: list[int]
    """What an agent that counts the rows it acted on has counted when it acts on each row."""
    advantage: tuple[float, float]
    """Â of the first row and of the second, where γ = λ = ½ and V(k) = k. Row k leads to k + 1, so the residuals δ are
    1 + ½·1 - 0 = 1.5, 2 + ½·2 - 1 = 2 (without the bootstrap 1), 4 + ½·3 - 2 = 3.5, 8 - 3 = 5, 16 + ½·0 - 4 = 12; from
    the third row on Â is the same in every case: 3.5 + ¼·5 = 4.75, 5, 12."""


END = {"episodes": [(3.0, 2), (12.0, 2)], "slice": [1.0, 2.0], "carry": [0, 1, 0, 1, 0]}
GOES_ON = 2 + 4.75 / 4
CASES = {
    "ordinary": Case(
        0, 0, 0, 1, [(15.0, 4)], (1 + 1 + 1, 1 / 8, 0), [1.0, 2.0, 4.0, 8.0], [0, 1, 2, 3, 0],
        (1.5 + GOES_ON / 4, GOES_ON),
    ),
    "end for good": Case(1, 0, 1, 1, window=(1 + 1, 1 / 4, 1), advantage=(1.5 + 1 / 4, 1), **END),
    "time limit": Case(0, 1, 1, 1, window=(1 + 1, 1 / 4, 0), advantage=(1.5 + 2 / 4, 2), **END),
    "both": Case(1, 1, 1, 1, window=(1 + 1, 1 / 4, 1), advantage=(1.5 + 1 / 4, 1), **END),
    "lost life": Case(
        1, 0, 0, 1, [(15.0, 4)], (1 + 1, 1 / 4, 1), [1.0, 2.0], [0, 1, 2, 3, 0], (1.5 + 1 / 4, 1)
    ),
    "surplus": Case(
        0, 0, 0, 0, [(13.0, 3)], (1 + 2 + 2, 1 / 8, 1), [1.0, 4.0, 8.0], [0, 1, 1, 2, 0], (1.5 + 4.75 / 4, 0)
    ),
    "lost": Case(0, 0, 1, 0, [(12.0, 2)], (1, 1 / 2, 0), [1.0], [0, 1, 0, 1, 0], (1.5, 0)),
}  # fmt: skip
REWARDS = [1.0, 2.0, 4.0, 8.0, 16.0]
every_case = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


class Script:
    """The five rows, again and again; row k is acted on where ``obs`` is k. Without autoreset a row that has ended
    waits for its reset, as the contract says, and the script goes on where it stood."""

    num_envs, device = 1, torch.device("cpu")

    def __init__(self, case: Case, autoreset: bool) -> None:
        self.spec, self.case, self.autoreset = SPEC, case, autoreset
        self.now, self.waits = 0, False
        self.parameters = {"p": torch.zeros(1)}

    def row(self, k: int) -> tuple[int, int, int, int]:
        if k == 1:
            return self.case.terminated, self.case.truncated, self.case.ended, self.case.valid
        return (1, 0, 1, 1) if k == 3 else (0, 0, 0, 1)

    def obs(self) -> Tensor:
        return torch.tensor([[float(self.now % 5)]])

    def reset(self, seeds: Any = None, mask: Any = None, options: Any = None, noise_seeds: Any = None) -> Obs:
        self.waits = False
        return self.obs()

    def step(self, action: Tensor) -> Step:
        idle = self.waits
        terminated, truncated, ended, valid = (0, 0, 0, 0) if idle else self.row(self.now % 5)
        reward = torch.tensor([REWARDS[self.now % 5] if valid else 0.0])
        self.now += not idle
        self.waits = idle or (not self.autoreset and bool(ended and valid))
        flags = (torch.tensor([bool(x)]) for x in (terminated, truncated, ended, valid))
        return Step(self.obs(), self.obs(), reward, *flags, {})

    def set_parameters(self, **values: Any) -> None: ...

    def state_dict(self) -> None: ...

    def load_state_dict(self, state: Any) -> Obs:
        raise NotImplementedError

    def close(self) -> None: ...


def steps(case: Case) -> list[tuple[Obs, Step]]:
    """The five rows, each with the observation that it was acted on."""
    env = Script(case, autoreset=True)
    obs, found = env.reset(), []
    for _ in range(5):
        step = env.step(torch.zeros(1))
        found.append((obs, step))
        obs = step.obs
    return found


@every_case
def test_the_counter(case: Case) -> None:
    counter = EpisodeCounter(SPEC, 1)
    episodes = [episode for _, step in steps(case) for episode in counter.count(step).values()]
    assert [(e.total_reward, e.length) for e in episodes] == case.episodes
    assert (float(counter.returns), int(counter.lengths)) == (16.0, 1)
    assert int(counter.lost) == (case is CASES["lost"])


@every_case
def test_the_normaliser(case: Case) -> None:
    """Transitions are counted, and the discounted return is cut where the episode's is."""
    normalizer = Normalizer(SPEC, obs=True, reward=True, gamma=1.0)
    for obs, step in steps(case):
        normalizer.observe(obs, step)
    acted_on = [0, 1, 2, 3, 4] if case.valid else [0, 2, 3, 4]
    assert float(normalizer.moments[""].count) == len(acted_on)
    assert float(normalizer.moments[""].mean) == pytest.approx(sum(acted_on) / len(acted_on))
    running = [1, 3, 7, 15, 16] if not case.ended else [1, 3, 4, 12, 16]
    if not case.valid:
        running = [1, 4, 12, 16] if case.ended else [1, 5, 13, 16]
    assert normalizer.returns is not None
    assert float(normalizer.returns.mean) == pytest.approx(sum(running) / len(running))


def filled(case: Case, **options: Any) -> ReplayBuffer:
    """What ``ReplayLoop`` stores of the five rows."""
    buffer = ReplayBuffer(8, SPEC.observation_space, SPEC.action_space, gamma=GAMMA, **options)
    loop = replay_loop(case, buffer)
    for _ in range(5):
        loop.advance()
    return buffer


class Counts(DiscreteSAC):
    """Its carry is how many rows it has acted on in this episode."""

    def initial_carry(self, rows: int = 1) -> Carry:
        return {"count": torch.zeros(rows, dtype=torch.int64)}

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        assert carry is not None
        self.__dict__.setdefault("seen", []).append(int(carry["count"]))
        return Act(super().act(obs).action, {"count": carry["count"] + 1})


def replay_loop(case: Case, buffer: ReplayBuffer) -> ReplayLoop:
    config = DiscreteSACConfig(network=NetworkConfig(hidden=(4,)), warmup_steps=1000)
    return ReplayLoop(Counts(SPEC, config), Script(case, autoreset=True), buffer, 1000)


@every_case
def test_windows(case: Case) -> None:
    batch = filled(case, n_step=3).batch(torch.tensor([0]))
    assert (float(batch.reward), float(batch.discount), float(batch.terminated)) == case.window


@every_case
def test_slices(case: Case) -> None:
    found = filled(case, sampler=SequenceSampler(UniformSampler(), 5)).batch(torch.zeros(1, dtype=torch.int64))
    assert found.mask is not None
    assert found.reward[found.mask > 0].tolist() == case.slice
    assert float(found.terminated.sum()) == float(case.terminated or len(case.slice) > 2)


@every_case
def test_windows_where_another_environment_fills_the_row(case: Case) -> None:
    """A surplus row beside a transition takes a slot: never drawn, and a window ends before it."""
    buffer = ReplayBuffer(16, SPEC.observation_space, SPEC.action_space, num_envs=2, n_step=3, gamma=GAMMA)
    for obs, step in steps(case):
        beside = step._replace(
            reward=torch.ones(1), terminated=NO, truncated=NO, ended=NO, valid=~NO
        )  # an ordinary step that pays 1
        reward, *flags = (torch.cat(both) for both in zip(step[2:7], beside[2:7], strict=True))
        shown = map_obs(lambda x: torch.cat([x, x]), obs)
        buffer.add(shown, torch.zeros(2, dtype=torch.int64), reward, shown, *flags)
    batch = buffer.batch(torch.tensor([0, 1]))
    mine = (float(batch.reward[0]), float(batch.discount[0]), float(batch.terminated[0]))
    assert mine == ((1.0, 1 / 2, 0.0) if case is CASES["surplus"] else case.window)
    assert (float(batch.reward[1]), float(batch.discount[1])) == (1.75, 1 / 8)
    drawn = torch.cat([buffer.sample(64).index for _ in range(4)])
    assert (2 in drawn.tolist()) == bool(case.valid)


@every_case
def test_the_replay_loop(case: Case) -> None:
    loop = replay_loop(case, ReplayBuffer(8, SPEC.observation_space, SPEC.action_space))
    episodes = [e for _ in range(5) for e in loop.advance().episodes]
    assert [(e.total_reward, e.length) for e in episodes] == case.episodes
    assert loop.step == 4 + case.valid
    assert loop.buffer.transitions == 4 + case.valid
    assert len(loop.buffer) == 4 + (case is not CASES["surplus"])


@every_case
def test_the_carry_of_the_replay_loop(case: Case) -> None:
    loop = replay_loop(case, ReplayBuffer(8, SPEC.observation_space, SPEC.action_space))
    for _ in range(5):
        loop.advance()
    assert isinstance(loop.agent, Counts)
    assert loop.agent.seen == case.carry  # type: ignore[attr-defined]


class Values(PPO):
    """Values the state k at k, counts the rows it has acted on in this episode, and keeps what it would learn from."""

    extra_fields: ClassVar = {"carry/count": ((), torch.int64)}

    def initial_carry(self, rows: int = 1) -> Carry:
        return {"count": torch.zeros(rows, dtype=torch.int64)}

    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        assert carry is not None
        return Act(super().act(obs).action, {"count": carry["count"] + 1})

    def judge(self, rollout: Rollout) -> tuple[Tensor, ...]:
        assert isinstance(rollout.obs, Tensor) and isinstance(rollout.next_obs, Tensor)
        return torch.zeros_like(rollout.reward), rollout.obs[..., 0], rollout.next_obs[..., 0]

    def update(self, batch: Rollout) -> Update:
        self.rollout, self.data = batch, self.samples(batch, torch.arange(batch.valid.numel()))
        return Update({})


def rollout_loop(env: Script, steps: int) -> tuple[RolloutLoop, Values]:
    """Five steps, of which ``steps`` are stored, and then an update."""
    config = PPOConfig(rollout_steps=steps, gamma=GAMMA, gae_lambda=0.5, network=NetworkConfig(hidden=(4,)))
    agent = Values(SPEC, config)
    return RolloutLoop(agent, env, 1000), agent


@every_case
def test_the_rollout_loop(case: Case) -> None:
    """A vector step without any transition is left out; where an episode was lost there is a row that cuts."""
    kept = [k for k in range(5) if k != 1 or case is not CASES["surplus"]]
    loop, agent = rollout_loop(Script(case, autoreset=True), len(kept))
    episodes = [e for _ in range(5) for e in loop.advance().episodes]
    assert [(e.total_reward, e.length) for e in episodes] == case.episodes
    assert loop.step == 4 + case.valid and not loop.steps
    rollout = agent.rollout
    assert rollout.valid[:, 0].tolist() == [k != 1 or bool(case.valid) for k in kept]
    assert rollout.reward[:, 0].tolist() == [REWARDS[k] * (k != 1 or case.valid) for k in kept]
    stored = rollout.extras["carry/count"][:, 0]
    assert stored[rollout.valid[:, 0]].tolist() == [case.carry[k] for k in kept if k != 1 or case.valid]


@every_case
def test_generalised_advantages(case: Case) -> None:
    """Beside a row of ordinary steps that pay 1 and end with the fourth: δ = 1.5, 1, 0.5, -2 there."""
    loop, agent = rollout_loop(TwoScripts(case, autoreset=True), 5)
    for _ in range(5):
        loop.advance()
    advantage, target = (x.view(5, 2) for x in (agent.data.advantage, agent.data.target))
    assert advantage[:, 0].tolist() == [*case.advantage, 4.75, 5.0, 12.0]
    assert advantage[:, 1].tolist() == [1.5 + 1 / 4, 1.0, 0.5 - 2 / 4, -2.0, 0.0]
    valid = agent.rollout.valid[:, 0]
    assert torch.equal(target[valid, 0], (advantage[:, 0] + torch.arange(5.0))[valid])


class CountingPolicy(Policy):
    """Its carry is how many rows it has acted on."""

    def __init__(self) -> None:
        agent = DiscreteSAC(SPEC, DiscreteSACConfig(network=NetworkConfig(hidden=(4,))))
        super().__init__(SPEC, agent.actor_module)
        self.seen: list[int] = []

    def initial_carry(self, rows: int = 1) -> Carry:
        return {"count": torch.zeros(rows, dtype=torch.int64)}

    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Act:
        assert carry is not None
        self.seen.append(int(carry["count"]))
        return Act(super().act(obs).action, {"count": carry["count"] + 1})


@every_case
def test_the_evaluator(case: Case) -> None:
    """A lost life ends no evaluation; an episode that was lost begins anew; a surplus row is as if it were not."""
    policy = CountingPolicy()
    (episode,) = run_episodes(policy, Script(case, autoreset=False), 1, seed=0)
    assert (episode.total_reward, episode.length) == case.episodes[0]
    assert policy.seen == case.carry[: 2 if case.ended and case.valid else 4]


@every_case
def test_the_simulator_of_an_adversary(case: Case) -> None:
    simulator = Simulator(Script(case, autoreset=False), ParameterBox.of({"p": (0.0, 1.0)}), 1)
    assert simulator.returns(CountingPolicy(), torch.zeros(1, 1), seed=0).tolist() == [[case.episodes[0][0]]]


class Watcher(Reinforce):
    """Keeps the rollout that a ``GroupLoop`` gives it."""

    rollout: Rollout

    def update(self, batch: Rollout) -> Update:
        self.rollout = batch
        return Update({})


def group_loop(case: Case, **options: Any) -> tuple[GroupLoop, Watcher]:
    config = ReinforceConfig(groups=1, group_size=2, network=NetworkConfig(hidden=(4,)), **options)
    agent = Watcher(SPEC, config)
    return GroupLoop(agent, TwoScripts(case, autoreset=False), 100), agent


class TwoScripts(Script):
    """The script beside a row of ordinary steps that pay 1, of which the last is the fourth transition."""

    num_envs = 2

    def reset(self, seeds: Any = None, mask: Any = None, options: Any = None, noise_seeds: Any = None) -> Obs:
        self.left = 4
        return map_obs(lambda x: torch.cat([x, x]), super().reset())

    def step(self, action: Tensor) -> Step:
        mine = super().step(action)
        self.left -= 1
        end, on = torch.tensor([self.left == 0]), torch.tensor([self.left >= 0])
        other = mine._replace(reward=on.float(), terminated=end, truncated=NO, ended=end, valid=on)
        obs = map_obs(lambda x: torch.cat([x, x]), mine.obs)
        return Step(obs, obs, *(torch.cat(both) for both in zip(mine[2:7], other[2:7], strict=True)), {})


@every_case
def test_the_group_loop(case: Case) -> None:
    """Rollouts hold an episode's transitions one after the other; one that was lost is not complete."""
    loop, agent = group_loop(case)
    episodes = loop.advance().episodes
    lost = case is CASES["lost"]
    first = [] if lost else case.episodes[:1]
    assert [(e.total_reward, e.length) for e in episodes] == [*first, (4.0, 4)]
    rollout = agent.rollout
    assert rollout.complete.tolist() == [not lost, True]
    rewards = [1.0] if lost else {3.0: [1.0, 2.0], 15.0: [1.0, 2.0, 4.0, 8.0], 13.0: [1.0, 4.0, 8.0]}[first[0][0]]
    assert rollout.valid.sum(0).tolist() == [len(rewards), 4]
    assert rollout.reward[: len(rewards), 0].tolist() == rewards
    assert not rollout.reward[len(rewards) :, 0].any()
    assert rollout.terminated[len(rewards) - 1, 0] == (not lost and case is not CASES["time limit"])
    assert rollout.truncated[:, 0].any() == (case is CASES["time limit"])
    if case is CASES["lost life"]:  # cut, but not ended
        assert rollout.terminated[:, 0].tolist() == [False, True, False, True]
        assert returns_to_go(rollout.reward, 1.0, rollout.terminated)[:, 0].tolist() == [3.0, 2.0, 12.0, 8.0]
        assert returns_to_go(rollout.reward, 1.0)[:, 0].tolist() == [15.0, 14.0, 12.0, 8.0]


def test_the_horizon_of_a_loop_is_a_time_limit_of_transitions() -> None:
    loop, agent = group_loop(CASES["surplus"], horizon=2)
    assert [(e.total_reward, e.length) for e in loop.advance().episodes] == [(5.0, 2), (2.0, 2)]
    rollout = agent.rollout
    assert rollout.truncated[:2].tolist() == [[False, False], [True, True]] and not rollout.terminated.any()

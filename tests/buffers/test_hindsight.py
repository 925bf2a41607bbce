"""Hindsight replay: goals that were reached later in the same episode, over any sampler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st

from rlopt.buffers import HindsightSampler, PrioritizedSampler, ReplayBuffer, SequenceSampler, UniformSampler
from rlopt.buffers.samplers.per_run import RunSamplers
from rlopt.registry import get_sampler
from rlopt.state import states_equal
from rlopt.training import train_config
from rlopt.training.setup import make_loop, resolve_config
from rlopt.types import RloptError
from tests.buffers.cases import SAMPLERS
from tests.buffers.goal_env import Walk

N = 2
LINE = spaces.Box(-np.inf, np.inf, (1,))
SPACE = spaces.Dict({"observation": LINE, "achieved_goal": LINE, "desired_goal": LINE})


def make(rows: int = 20, over: Any = "uniform", env: Any = None, space: Any = SPACE, **options: Any) -> ReplayBuffer:
    sampler = HindsightSampler(Walk() if env is None else env, over, options.pop("relabelled", 0.8))
    return ReplayBuffer(N * rows, space, spaces.Box(-1, 1, (1,)), N, sampler, seed=3, **options)


def add(buffer: ReplayBuffer, events: list[str]) -> None:
    """A row: environment e stands at 10·row + e before it and at 10·row + 10 + e behind; goals lie nowhere near."""
    number = 10.0 * buffer.rows_written + torch.arange(N)[:, None]

    def tree(place: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"observation": place, "achieved_goal": place, "desired_goal": torch.full((N, 1), -1000.0)}

    buffer.add(
        tree(number),
        torch.zeros(N, 1),
        -torch.ones(N),
        tree(number + 10),
        torch.tensor([event in ("terminate", "life") for event in events]),
        torch.tensor([event == "truncate" for event in events]),
        ended=torch.tensor([event in ("terminate", "truncate", "ended") for event in events]),
        valid=torch.tensor([event != "invalid" for event in events]),
    )


EVENTS = ["go"] * 6 + ["terminate", "truncate", "life", "ended", "invalid"]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(EVENTS), min_size=N, max_size=N), min_size=1, max_size=25),
    st.integers(1, 9),
    st.integers(0, 25),
)
def test_goals_come_from_the_same_episode_or_the_present_place(
    script: list[list[str]], rows: int, drawn_after: int
) -> None:
    """Against brute force, with the ends of episodes read from the ring or followed from some row on."""
    buffer = make(rows, relabelled=1.0)
    for t, row in enumerate(script):
        add(buffer, row)
        if t == drawn_after and buffer.transitions:
            buffer.sample(1)
    held = range(max(0, len(script) - rows), len(script))
    where = [(t, e) for t in held for e in range(N) if script[t][e] != "invalid"]
    if not where:
        return
    seen: dict[tuple[int, int], set[float]] = {key: set() for key in where}
    index = torch.tensor([(t % rows) * N + e for t, e in where])
    for _ in range(60):
        batch = buffer.batch(index)
        assert torch.equal(batch.obs["desired_goal"], batch.next_obs["desired_goal"])  # type: ignore[call-overload]
        for key, goal in zip(where, batch.obs["desired_goal"].flatten().tolist(), strict=True):  # type: ignore[call-overload]
            seen[key].add(goal)
    for t, e in where:
        last = t
        while script[last][e] == "go" and last + 1 < len(script) and script[last + 1][e] != "invalid":
            last += 1
        assert seen[t, e] <= {10.0 * s + 10 + e for s in range(t, last + 1)}
        if last - t < 5:
            assert len(seen[t, e]) == last - t + 1


def test_every_later_place_is_as_likely_and_the_share_is_as_asked() -> None:
    buffer = make()
    for t in range(8):
        add(buffer, ["truncate" if t in (3, 7) else "go"] * N)
    goals: Counter[float] = Counter()
    for _ in range(400):
        batch = buffer.batch(torch.full((10,), N))  # row 1 of environment 0: rows 1, 2, 3 are left of its episode
        goals.update(batch.obs["desired_goal"].flatten().tolist())  # type: ignore[call-overload]
    assert set(goals) == {-1000.0, 20.0, 30.0, 40.0}
    assert goals[-1000.0] / 4000 == pytest.approx(0.2, abs=0.02)
    for goal in (20.0, 30.0, 40.0):
        assert goals[goal] / 4000 == pytest.approx(0.8 / 3, abs=0.03)


@pytest.mark.parametrize("transform", [None, "clip"])
def test_rewards_and_terminations_are_the_environments_own(transform: str | None) -> None:
    """The goal that is the transition's own place is reached, every later one is not; what keeps its goal keeps all."""
    buffer = make(env=Walk(ends=True), reward_transform=transform)
    for _ in range(6):
        add(buffer, ["go"] * N)
    batch = buffer.sample(200)
    goal, place = (batch.next_obs[key].flatten() for key in ("desired_goal", "achieved_goal"))
    reached = goal == place
    assert 0 < int(reached.sum()) < 200 and int((goal == -1000).sum()) > 0
    assert torch.equal(batch.reward, -(~reached).float()) and torch.equal(batch.terminated, reached.float())
    assert torch.equal(batch.obs["achieved_goal"].flatten() + 10, place)


class OneByOne:
    """Its reward takes one pair of goals; terminations are as stored."""

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: dict[str, Any]) -> float:
        return -float(np.linalg.norm(achieved_goal - desired_goal) > 0.5)


def test_functions_of_one_pair_of_goals_are_asked_row_by_row() -> None:
    ours, theirs = make(env=OneByOne()), make()
    for buffer in (ours, theirs):
        for _ in range(6):
            add(buffer, ["go"] * N)
    a, b = ours.sample(50), theirs.sample(50)
    assert torch.equal(a.reward, b.reward) and len(a.reward.unique()) == 2


@pytest.mark.parametrize("over", SAMPLERS)
def test_it_stands_over_every_sampler_and_goes_on_where_it_was_saved(over: str) -> None:
    buffer, back = make(over=get_sampler(over)(**SAMPLERS[over])), make(over=get_sampler(over)(**SAMPLERS[over]))
    script = [["go", "truncate" if t % 4 == 3 else "go"] for t in range(60)]
    for row in script[:27]:
        add(buffer, row)
        buffer.sample(3)
    back.load_state_dict(buffer.state_dict())
    back.write_rows(7, buffer.read_rows(7, 27))
    for row in script[27:]:
        for b in (buffer, back):
            add(b, row)
        ours, theirs = buffer.sample(5), back.sample(5)
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.reward, theirs.reward)
        assert torch.equal(ours.obs["desired_goal"], theirs.obs["desired_goal"])
        for b in (buffer, back):
            b.update_priority(ours.index, ours.reward.abs() + 0.1)


def test_each_run_has_goals_of_its_own_stream() -> None:
    runs = make(over=RunSamplers([UniformSampler(), UniformSampler()], N), relabelled=1.0)
    for _ in range(6):
        add(runs, ["go"] * N)
    goals = runs.sample(8).obs["desired_goal"].flatten()
    assert (goals % 10).tolist() == [0.0] * 4 + [1.0] * 4
    assert runs.sampler.state_dict()["of"]["runs"] == 2


def config(**buffer: Any) -> dict[str, Any]:
    return {
        "env": {"id": "rlopt-tests/Walk-v0"},
        "buffer": {"name": "hindsight", "capacity": 60, **buffer},
        "agent": {
            "name": "sac", "warmup_steps": 12, "batch_size": 8, "network": {"hidden": [8]}, "fused": False,
        },
        "num_envs": 2, "total_steps": 60, "seed": 1, "eval": {"every": None, "episodes": 1}, "threads": 1,
    }  # fmt: skip


@pytest.mark.parametrize("runs", [1, 2])
def test_the_words_of_the_command_line(runs: int) -> None:
    """A loop learns with it, and one that is resumed goes on exactly."""
    options = {**config(over="prioritized", alpha=0.5, relabelled=0.5), "num_runs": runs}
    loop, back = (make_loop(resolve_config(train_config(options))) for _ in range(2))
    sampler: Any = loop.buffer.sampler  # type: ignore[attr-defined]
    assert isinstance(sampler, HindsightSampler) and sampler.relabelled == 0.5
    first = sampler.inner.samplers[0] if runs > 1 else sampler.inner
    assert isinstance(first, PrioritizedSampler) and first.alpha == 0.5
    while loop.step < 40:
        loop.advance()
    back.load_state_dict(loop.state_dict())
    for name, log in back.row_logs().items():
        written = loop.row_logs()[name].rows_written
        log.write_rows(0, loop.row_logs()[name].read_rows(0, written))
    back.rows_restored()
    while loop.step < 60:
        loop.advance()
        back.advance()
    assert loop.agent.clock.updates > 30
    assert states_equal(loop.state_dict(), back.state_dict()) is None
    loop.close()
    back.close()


def test_a_wrapper_that_changes_rewards_is_noticed() -> None:
    with pytest.raises(RloptError, match="compute_reward says -1 where the environment paid -2: a wrapper changes"):
        buffer = make(env=TransformReward(Walk(), lambda r: 2 * r))
        add(buffer, ["go"] * N)
        buffer.block[:, :, buffer.slices["reward"]] = -2.0
        buffer.sample(4)


class Asks:
    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: dict[str, Any]) -> Any:
        return info["contact"]


def test_the_sampler_below_decides_the_loss() -> None:
    agent = resolve_config(train_config(config(over="lap", floor=0.5))).agent
    assert (agent.td_loss, agent.td_threshold) == ("huber", 0.5)
    assert resolve_config(train_config(config())).agent.td_loss == "squared"


def test_mistakes_are_told() -> None:
    with pytest.raises(RloptError, match=r"has no compute_reward\(achieved_goal, desired_goal, info\)"):
        make(env=object())
    with pytest.raises(RloptError, match="needs Dict observations with achieved_goal and desired_goal"):
        make(space=spaces.Dict({"achieved_goal": LINE}))
    with pytest.raises(RloptError, match=r"agent\.n_step=2 is not combined with buffer=hindsight"):
        make(n_step=2)
    with pytest.raises(RloptError, match=r"buffer\.relabelled must be within"):
        make(relabelled=1.5)
    with pytest.raises(RloptError, match="names a plain sampler"):
        make(over=SequenceSampler(UniformSampler(), 2))
    with pytest.raises(RloptError, match=r"compute_reward fails with goals and an empty info \(KeyError: 'contact'\)"):
        buffer = make(env=Asks())
        add(buffer, ["go"] * N)
        buffer.sample(4)
    with pytest.raises(RloptError, match=r"buffer\.alpha: no such option"):
        train_config(config(over="uniform", alpha=0.5))
    with pytest.raises(RloptError, match=r"buffer\.over=hindsight stands over another sampler itself"):
        train_config(config(over="hindsight"))
    with pytest.raises(RloptError, match=r"leave buffer\.sequence_length out"):
        train_config(config(sequence_length=4)).buffer.stand_over(UniformSampler(), Walk)
    with pytest.raises(RloptError, match="has no compute_reward"):
        make_loop(resolve_config(train_config({**config(), "env": {"id": "Pendulum-v1"}})))


@pytest.mark.parametrize("count", [1, 3])
def test_a_data_set_is_an_episode_of_its_own(count: int) -> None:
    sampler = HindsightSampler(Walk(), relabelled=1.0)
    buffer = ReplayBuffer(20, SPACE, spaces.Box(-1, 1, (1,)), sampler=sampler)

    def data(first: float, rows: int) -> dict[str, Any]:
        place = first + 10.0 * np.arange(rows + 1)[:, None]

        def tree(x: Any) -> dict[str, Any]:
            return {"observation": x, "achieved_goal": x, "desired_goal": np.full_like(x, -1000.0)}

        no = np.zeros(rows, bool)
        return {
            "obs": tree(place[:-1]), "action": np.zeros((rows, 1)), "reward": -np.ones(rows),
            "next_obs": tree(place[1:]), "terminated": no, "truncated": no,
        }  # fmt: skip

    def add_one(first: float) -> None:
        row = data(first, 1)
        obs, next_obs = ({key: leaf[0] for key, leaf in row[name].items()} for name in ("obs", "next_obs"))
        buffer.add(obs, row["action"][0], -1.0, next_obs, False, False)

    add_one(0)
    add_one(10)
    buffer.sample(2)
    buffer.extend(data(100, count))
    add_one(500)
    goals = {i: set[float]() for i in range(3 + count)}
    for _ in range(60):
        batch = buffer.batch(torch.arange(3 + count))
        for i, goal in enumerate(batch.obs["desired_goal"].flatten().tolist()):  # type: ignore[call-overload]
            goals[i].add(goal)
    assert goals[0] == {10.0, 20.0} and goals[2 + count] == {510.0}
    assert goals[2] == {110.0 + 10 * i for i in range(count)}

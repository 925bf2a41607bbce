"""Learning against an adversary: who simulates what, on which random numbers, and an exact resume."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import SAC
from rlopt.agents.drpg_deep import DeepDRPG, DeepDRPGConfig, SearchConfig
from rlopt.agents.sac import SACConfig
from rlopt.analysis.parameter_grid import draw_parameter_grid
from rlopt.buffers import ReplayBuffer
from rlopt.envs.torch_env import TorchEnv
from rlopt.loops.parameter_box import ParameterBox, Simulator
from rlopt.loops.replay import ReplayLoop
from rlopt.loops.robust import RobustLoop
from rlopt.nn import NetworkConfig
from rlopt.policy import Policy
from rlopt.runs.checkpoint import Checkpoints
from rlopt.state import states_equal
from rlopt.training import train_config
from rlopt.training.grid_evaluation import GridCallback, evaluate_grid
from rlopt.training.setup import begin, make_loop, resume
from rlopt.training.trainer import Callback
from rlopt.types import RloptError

BOX = {"height": (0.0, 2.0), "tilt": (-1.0, 1.0)}


class Hill(TorchEnv):
    """Every episode pays ``start - (height - 1.5)² - tilt`` per step, whatever one does; ``start`` is drawn at the
    reset, and so is the episode's length of 2 to 5 steps (the parameters do not enter it)."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episode_limit = 5
    defaults = {"height": 1.0, "tilt": 0.0}

    def initial(self, streams):
        return torch.stack((streams.uniform(), 2.0 + (4.0 * streams.uniform()).floor()), 1)

    def dynamics(self, state, action):
        start, left = state.unbind(1)
        p = self.parameters
        reward = start - (p["height"] - 1.5).square() - p["tilt"]
        return torch.stack((start, left - 1.0), 1), reward, left <= 1.0

    def observe(self, state):
        return state[:, :1]


class Target(TorchEnv):
    """Pays -(action - target³)² per step: for the target uniform on [0, 1] the best action is 1/4 and has a worst case
    of -(3/4)², while the best worst case is that of 1/2, -1/4; for the nominal target, 0, it is 0 and has -1."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episode_limit = 5
    defaults = {"target": 0.0}

    def initial(self, streams):
        return streams.uniform()

    def dynamics(self, state, action):
        return state, -(action[:, 0] - self.parameters["target"].pow(3)).square(), torch.zeros_like(state) > 0

    def observe(self, state):
        return torch.zeros_like(state)[:, None]


def config(**options) -> DeepDRPGConfig:
    small = {"network": NetworkConfig(hidden=(8,)), "batch_size": 4, "warmup_steps": 10, "box": BOX}
    return DeepDRPGConfig(**{**small, **options})


def robust_loop(env: TorchEnv, options: DeepDRPGConfig, total_steps: int = 200, seed: int = 0) -> RobustLoop:
    agent = DeepDRPG(env.spec, options, seed=seed)
    buffer = ReplayBuffer(10_000, env.spec.observation_space, env.spec.action_space, num_envs=env.num_envs, seed=seed)
    make = lambda n: type(env)(n, seed=seed, autoreset=False, stream="adversary")  # noqa: E731
    return RobustLoop(agent, env, buffer, total_steps, seed=seed, simulate=make)


def policy_of(env: TorchEnv) -> Policy:
    return SAC(env.spec, SACConfig(network=NetworkConfig(hidden=(8,)))).policy


# --- simulating many parameters side by side ------------------------------------------------------------------------


def test_all_candidates_meet_the_same_random_numbers() -> None:
    env, box = Hill(12, autoreset=False), ParameterBox.of(BOX)
    simulator = Simulator(env, box, episodes=3)
    points = torch.tensor([[0.75, 0.5], [0.75, 0.5], [0.25, 0.5], [0.75, 1.0]], dtype=torch.float64)
    returns = simulator.returns(policy_of(env), points, seed=5)
    assert returns.shape == (4, 3)
    assert torch.equal(returns[0], returns[1])
    assert len(set(returns[0].tolist())) == 3
    # height 1.5, tilt 0: the sum of starts. Height 0.5 costs 1 a step and tilt 1 costs 1 a step, on the same lengths.
    torch.testing.assert_close(returns[2], returns[3])
    lengths = returns[0] - returns[2]
    torch.testing.assert_close(lengths, lengths.round())
    assert simulator.steps == 4 * int(lengths.round().sum())
    assert not torch.equal(simulator.returns(policy_of(env), points, seed=6)[0], returns[0])


def test_neither_waves_nor_what_was_simulated_before_change_a_return() -> None:
    points = torch.rand((5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for rows in (2, 5, 10, 13):  # 1, 2, 5 and 6 points at a time, with a row to spare in two of them
        env = Hill(rows, autoreset=False, seed=rows)
        simulator = Simulator(env, ParameterBox.of(BOX), episodes=2)
        simulator.returns(policy_of(env), points[:1], seed=8)
        found.append(simulator.returns(policy_of(env), points, seed=7))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_point_of_the_box_in_the_simulators_units() -> None:
    box = ParameterBox.of(BOX)
    values = box.values(torch.tensor([[0.0, 0.0], [0.25, 1.0]]))
    assert {k: v.tolist() for k, v in values.items()} == {"height": [0.0, 0.5], "tilt": [-1.0, 1.0]}
    assert box.nominal(Hill(2)).tolist() == [0.5, 0.5]
    assert box.grid(3)[:4].tolist() == [[0.0, 0.0], [0.0, 0.5], [0.0, 1.0], [0.5, 0.0]]


# --- the loop -------------------------------------------------------------------------------------------------------


def test_the_adversary_finds_the_worst_parameters_and_its_samples_are_counted_apart() -> None:
    """Worst are height 0, farthest from 1.5, and tilt 1."""
    loop = robust_loop(Hill(4), config(adversary_every=20, search=SearchConfig(episodes=3, rounds=6)))
    while loop.step < loop.total_steps:
        loop.advance()
    assert loop.adversary.worst.tolist() == [0.0, 1.0]
    assert loop.step == 200 and 4 * loop.buffer.rows_written == 200
    assert loop.adversary.ascents == len(range(10 + 20, 200, 20))
    counters = loop.counters()
    assert counters["worst_height"] == 0.0 and counters["worst_tilt"] == 1.0
    assert counters["adversary_tolerance"] > 0.0
    assert counters["adversary_steps"] == loop._simulator.steps > 8 * 3 * 2 * loop.adversary.ascents


class Watched(Hill):
    """Remembers every step's parameters and resets."""

    def step(self, action):
        heights = self.parameters["height"].clone()
        step = super().step(action)
        self.seen.append((heights, step.ended.clone()))
        return step


def test_rows_keep_their_parameters_until_their_episode_ends() -> None:
    env = Watched(6)
    env.seen = []
    loop = robust_loop(env, config(adversary="uniform"), total_steps=240)
    while loop.step < loop.total_steps:
        loop.advance()
    values = set()
    for (before, reset), (after, _) in zip(env.seen, env.seen[1:], strict=False):
        assert torch.equal(before != after, reset)
        values |= set(before.tolist())
    assert len(values) > 30 and min(values) < 0.3 and max(values) > 1.7


def test_the_nominal_adversary_is_plain_sac() -> None:
    env, other = Hill(4), Hill(4)
    loop = robust_loop(env, config(adversary="nominal"), total_steps=120)
    agent = SAC(other.spec, SACConfig(network=NetworkConfig(hidden=(8,)), batch_size=4, warmup_steps=10))
    buffer = ReplayBuffer(10_000, other.spec.observation_space, other.spec.action_space, num_envs=4)
    plain = ReplayLoop(agent, other, buffer, 120)
    for each in (loop, plain):
        while each.step < 120:
            each.advance()
    assert agent.clock.updates == 110 and torch.equal(loop.agent.actor.flat, agent.actor.flat)
    assert loop.counters() == {}


def test_a_loop_that_was_saved_goes_on_as_if_nothing_had_been() -> None:
    options = config(adversary_every=20, search=SearchConfig(rounds=3))
    whole, first = robust_loop(Hill(3), options), robust_loop(Hill(3), options)
    for _ in range(60):
        whole.advance()
    for _ in range(25):
        first.advance()
    second = robust_loop(Hill(3), options)
    second.load_state_dict(first.state_dict())
    for name, rows in first.row_logs().items():
        second.row_logs()[name].write_rows(0, rows.read_rows(0, rows.rows_written))
    for _ in range(35):
        second.advance()
    assert whole.adversary.ascents > first.adversary.ascents > 0
    assert states_equal(whole.state_dict(), second.state_dict()) is None


class StopAt(Callback):
    def on_step(self, trainer, progress):
        return trainer.loop.step >= 300


def test_a_resumed_run_equals_one_in_a_piece_tables_and_grid_included(tmp_path: Path) -> None:
    def started(name: str, callbacks):
        mapping = {
            "seed": 3, "total_steps": 640, "num_envs": 2, "device": "cpu", "threads": 1,
            "run_dir": str(tmp_path / name),
            "agent": {
                "name": "drpg_deep", "box": {"m": [0.5, 1.5], "l": [0.5, 1.5]}, "adversary_every": 120,
                "network": {"hidden": [8]}, "batch_size": 4, "warmup_steps": 40, "search": {"rounds": 2, "episodes": 1},
            },
            "env": {"id": "Pendulum-v1", "backend": "torch", "kwargs": {"max_episode_steps": 30}},
            "eval": {"every": 200, "episodes": 2}, "log": {"every": 100, "tensorboard": False},
        }  # fmt: skip
        return begin(train_config(mapping), callbacks)

    def grid() -> GridCallback:
        return GridCallback("Pendulum-v1", {"m": (0.5, 1.5), "l": (0.5, 1.5)}, count=2, episodes=1)

    def finish(trainer) -> None:
        try:
            trainer.run()
        finally:
            trainer.close()

    finish(started("whole", [grid()]))
    finish(started("parts", [grid(), StopAt()]))
    finish(resume(tmp_path / "parts", {}, [grid()]))
    states = [Checkpoints(tmp_path / name / "checkpoints").load().state["loop"] for name in ("whole", "parts")]
    assert states[0]["step"] == 640 and int(states[0]["agent"]["adversary_counts"][0]) == 4
    assert states_equal(*states) is None
    for name in ("metrics.csv", "robust_evaluations.csv", "episodes.csv"):
        tables = []
        for run in ("whole", "parts"):
            with (tmp_path / run / name).open() as file:
                rows = list(csv.DictReader(file))
            tables.append([{k: v for k, v in row.items() if "second" not in k} for row in rows])
        assert tables[0] == tables[1] != []
    assert len(tables[0]) > 0 and "worst_m" in (tmp_path / "whole" / "metrics.csv").read_text()


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "box", "message"),
    [
        ({"backend": "torch"}, {}, "agent.box is empty"),
        ({"backend": "torch"}, {"mass": [0.5, 1.5]}, r"agent\.box\.mass: Pendulum-v1 has no such .* it has g, m, l"),
        ({"backend": "sync"}, {"m": [0.5, 1.5]}, "use env.backend=torch"),
    ],
)
def test_mistakes_are_told_in_one_line(env, box, message: str) -> None:
    mapping = {"device": "cpu", "env": {"id": "Pendulum-v1", **env}, "agent": {"name": "drpg_deep", "box": box}}
    with pytest.raises(RloptError, match=message):
        make_loop(train_config({**mapping, "buffer": {"name": "uniform", "capacity": 1000}}))


# --- the grid -------------------------------------------------------------------------------------------------------


def test_the_grid_of_a_known_return(monkeypatch) -> None:
    """Worst and mean over 3 x 3 points of Σ start - length · ((height - 1.5)² + tilt)."""
    policy = policy_of(Hill(1))
    found = evaluate_grid(policy, f"{__name__}:Hill", BOX, count=3, episodes=2, seed=1)
    assert found.means.shape == (3, 3) and found.returns.shape == (9, 2)
    assert found.points[:4].tolist() == [[0.0, -1.0], [0.0, 0.0], [0.0, 1.0], [1.0, -1.0]]
    length = (found.means[0, 0] - found.means[0, 1]).item()  # one tilt costs 1 a step
    starts = found.means[1, 1] + length * 0.25
    expected = starts - length * (np.array([2.25, 0.25, 0.25])[:, None] + np.array([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose(found.means, expected, atol=1e-5)
    assert found.worst == pytest.approx(expected.min()) and found.mean == pytest.approx(expected.mean())
    assert np.unravel_index(found.means.argmin(), (3, 3)) == (0, 2)


@pytest.mark.parametrize("parameters", [1, 2, 3])
def test_pictures_of_one_two_and_more_parameters(parameters: int, tmp_path: Path) -> None:
    axes = {name: np.linspace(0.0, 1.0, 4) for name in ("a", "b", "c")[:parameters]}
    returns = np.random.default_rng(0).normal(size=(4,) * parameters)
    draw_parameter_grid({"one": returns, "two": returns + 1}, axes, tmp_path / "grid.png", {n: 0.5 for n in axes})
    assert (tmp_path / "grid.png").stat().st_size > 5_000
    with pytest.raises(RloptError, match="do not fit a grid"):
        draw_parameter_grid({"one": returns[:3]}, axes, tmp_path / "other.png")


def test_the_example_runs(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "robust_pendulum.py"
    spec = importlib.util.spec_from_file_location("robust_pendulum", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert -2_000 < example.main(steps=1_040, out=str(tmp_path / "run")) < 0
    assert (tmp_path / "run" / "grid.png").is_file()


# --- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_worst_case_is_better_than_that_of_plain_sac_and_of_domain_randomisation() -> None:
    worst: dict[str, float] = {}
    for adversary in ("worst", "uniform", "nominal"):
        options = config(
            box={"target": (0.0, 1.0)}, adversary=adversary, adversary_every=50, batch_size=64, warmup_steps=100,
            learning_rate=1e-2, update_ratio=(1, 4), gamma=0.0, temperature=1e-3, bag_share=1.0,
            network=NetworkConfig(hidden=(16,)),
        )  # fmt: skip
        loop = robust_loop(Target(4), options, total_steps=3_000)
        while loop.step < loop.total_steps:
            loop.advance()
        action = loop.policy().act(torch.zeros(1, 1)).action
        targets = torch.linspace(0.0, 1.0, 11).pow(3)
        worst[adversary] = float(-(action[0] - targets).square().max())
    assert worst["nominal"] < -0.9
    assert -0.7 < worst["uniform"] < -0.45
    assert worst["worst"] > -0.35

"""The DQN family: losses by hand, schedules, copies of the target, combinations, and Stable-Baselines3's update."""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents import DQN, DQNConfig
from rlopt.agents.dqn import Nets, loss
from rlopt.agents.td import averaged, huber, squared
from rlopt.buffers import Batch
from rlopt.nn import Net, NetworkConfig, OptimiserConfig, QActor
from rlopt.nn.values import CategoricalValues, ScalarValues, Values
from rlopt.policy import EvaluationMode, load_policy, save_policy
from rlopt.training import train_config
from rlopt.training.setup import make_loop, resolve_config
from rlopt.types import RloptError
from tests.agents.cases import AGENTS, CHOICE, OBSERVATION

NOTHING = (None, None, None)


class Table:
    """Answers with the rows (K, Z) that its parameters hold for the observations, which are numbers of rows."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def __call__(self, params: Tensor, obs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = params[obs] if noise is None else params[obs] + noise
        return self.values.mean(outputs), outputs


def table_nets(values: Values) -> Nets:
    table: Any = Table(values)
    return Nets(table, table, values)


def batch(**changes: Any) -> Batch:
    """Two transitions: state 0, action 1, reward 1, to state 1; state 1, action 0, reward -2, the end."""
    fields: dict[str, Any] = {
        "obs": torch.tensor([0, 1]), "action": torch.tensor([1, 0]), "reward": torch.tensor([1.0, -2.0]),
        "next_obs": torch.tensor([1, 0]), "terminated": torch.tensor([0.0, 1.0]), "discount": torch.full((2,), 0.5),
        "weight": None, "index": torch.arange(2),
    }  # fmt: skip
    return Batch(**{**fields, **changes})


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).unsqueeze(-1)


ONLINE, TARGET = table([1.0, 2.0], [3.0, 4.0]), table([0.0, 0.0], [10.0, 6.0])


@pytest.mark.parametrize(
    ("double", "expected"),
    [
        # y = 1 + ½ max(10, 6) = 6 against 2; y = -2 against 3.
        (False, (-4.0, 5.0)),
        # The network would choose action 1 in state 1, worth 6: y = 4.
        (True, (-2.0, 5.0)),
    ],
)
def test_the_loss_of_single_values_by_hand(double: bool, expected: tuple[float, float]) -> None:
    call = partial(loss, table_nets(ScalarValues()), ONLINE, TARGET, noise=NOTHING, double=double)
    found, metrics = call(batch(), td=squared)
    assert found.item() == pytest.approx(sum(x * x for x in expected) / 4)
    assert metrics["td"].tolist() == [abs(x) for x in expected] and metrics["q"].item() == 2.5
    clipped, _ = call(batch(), td=partial(huber, threshold=1.0))
    assert clipped.item() == pytest.approx(sum(abs(x) - 0.5 for x in expected) / 2)
    weighted, _ = call(batch(weight=torch.tensor([0.0, 1.0])), td=squared)
    assert weighted.item() == pytest.approx(25.0 / 4)


def test_laps_huber_on_both_sides_of_its_threshold() -> None:
    """Residuals 0.008 and 0.5 about a threshold of 0.01: gradients 0.008 and 0.01, each over two rows."""
    online = table([0.0, 1.008], [-1.5, 0.0]).requires_grad_()
    found, _ = loss(
        table_nets(ScalarValues()), online, torch.zeros(2, 2, 1), batch(), NOTHING, False,
        partial(huber, threshold=0.01),
    )  # fmt: skip
    assert found.item() == pytest.approx((0.5 * 0.008**2 + 0.01 * (0.5 - 0.005)) / 2, rel=1e-4)
    found.backward()  # type: ignore[no-untyped-call]
    assert online.grad is not None
    assert online.grad.flatten().tolist() == pytest.approx([0.0, 0.004, 0.005, 0.0], abs=1e-6)


def test_the_loss_of_distributions_takes_the_one_of_the_best_mean() -> None:
    """Atoms -1, 0, 1. In state 1 action 0 has the mean ¼ and action 1 the mean 0, so y is action 0's, shifted."""
    values = CategoricalValues(3, -1.0, 1.0)
    target = torch.tensor([[[1.0, 1, 1], [1, 1, 1]], [[0.25, 0.25, 0.5], [0.25, 0.5, 0.25]]]).log()
    online = torch.zeros(2, 2, 3)
    rows = batch(reward=torch.tensor([0.5, 0.5]))
    found, metrics = loss(table_nets(values), online, target, rows, NOTHING, False, averaged)
    # Whatever y is, a uniform prediction costs log 3.
    assert metrics["td"].tolist() == pytest.approx([torch.tensor(3.0).log().item()] * 2)
    assert found.item() == pytest.approx(metrics["td"].mean().item())
    y = values.goal(target[1, 0][None], torch.tensor([0.5]), torch.tensor([0.5]))
    assert y[0].tolist() == pytest.approx([0.0, 0.25 + 0.25 / 2, 0.25 / 2 + 0.5])  # lands at 0, ½ and 1


def test_each_network_has_noise_of_its_own() -> None:
    """The first draw moves what the network says, the second the target, the third what the network would choose."""
    noise = (torch.full((1, 1, 1), 0.1), torch.full((1, 1, 1), 1.0), torch.tensor([[[5.0], [0.0]]]))
    for third, after in ((noise[2], 11.0), (-noise[2], 7.0)):  # (3, 4) becomes (8, 4) or (-2, 4)
        draws = (noise[0], noise[1], third)
        _, metrics = loss(table_nets(ScalarValues()), ONLINE, TARGET, batch(), draws, True, squared)
        assert metrics["td"][0].item() == pytest.approx(abs(2.1 - (1 + 0.5 * after)))


# ---- schedules


def test_epsilon_falls_from_the_end_of_the_warm_up(make_agent) -> None:
    agent = make_agent("dqn", warmup_steps=100, epsilon_steps=50, epsilon_start=0.9, epsilon_end=0.1)
    found = []
    for step in (0, 100, 125, 150, 1000):
        agent.clock.env_steps = step
        found.append(agent.config.epsilon(agent.clock))
    assert found == pytest.approx([0.9, 0.9, 0.5, 0.1, 0.1])
    obs, best = torch.zeros(4000, 4), agent.act(torch.zeros(1, 4), deterministic=True).action
    for step, share in ((99, 1 / 3), (150, 0.9 + 0.1 / 3)):
        agent.clock.env_steps = step
        assert (agent.act(obs).action == best).float().mean().item() == pytest.approx(share, abs=0.03)


def test_epsilon_takes_a_tenth_of_the_run() -> None:
    options = {"agent": "dqn", "env": "CartPole-v1", "device": "cpu", "total_steps": 5000}
    assert resolve_config(train_config(options)).agent.epsilon_steps == 500
    assert resolve_config(train_config({**options, "agent.epsilon_steps": 70})).agent.epsilon_steps == 70
    assert resolve_config(train_config({**options, "agent": "ddqn_lap"})).agent.epsilon_steps == 1_000_000


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"target_counts": "updates", "target_every": 3}, [3, 6, 9]),
        # An update every four steps from step 20 on: 20, 24, 28, … The first after 30, 40, 50 is at 32, 40 and 52.
        ({"target_counts": "env_steps", "target_every": 10, "warmup_steps": 20}, [4, 6, 9]),
        ({"target_counts": "env_steps", "target_every": 10, "warmup_steps": 27}, [2, 5, 7]),
    ],
)
def test_copies_of_the_target_are_counted(options: dict[str, Any], copies: list[int], make_agent, make_batch) -> None:
    agent, found = make_agent("dqn", tau=1.0, **options), []
    for update in range(1, 10):
        agent.clock.env_steps = agent.config.warmup_steps + 4 * (update - 1)
        before = agent.target.flat.clone()
        agent.update(make_batch(agent, update))
        if not torch.equal(agent.target.flat, before):
            found.append(update)
            assert torch.equal(agent.target.flat, agent.critic.flat)
    assert found == copies


# ---- names, and what goes together


def test_names_are_presets() -> None:
    def config(name: str, **more: Any) -> Any:
        return resolve_config(train_config({"agent": name, "env": "CartPole-v1", "device": "cpu", **more}))

    lap, rainbow = config("ddqn_lap"), config("rainbow")
    assert (lap.agent.double, lap.agent.td_loss, lap.agent.td_threshold) == (True, "huber", 0.01)
    assert (lap.buffer.name, lap.buffer.alpha, lap.buffer.floor) == ("lap", 0.6, 0.01)
    assert (lap.agent.optimiser.name, lap.agent.optimiser.beta2) == ("rmsprop", 0.95)
    assert (rainbow.agent.noisy, rainbow.agent.dueling, rainbow.agent.n_step) == (0.5, True, 3)
    assert (rainbow.buffer.name, rainbow.buffer.alpha) == ("prioritized", 0.5)
    assert config("c51").agent.values == "categorical" and config("qr_dqn").agent.values == "quantile"
    assert config("c51").agent.td_loss == "auto"
    dqn = config("dqn")
    assert (dqn.agent.td_loss, dqn.agent.td_threshold) == ("huber", 1.0)
    assert config("ddqn_lap", buffer="prioritized_reshuffled").agent.td_threshold == 0.01
    assert config("dqn", **{"buffer": "lap", "buffer.floor": 0.1}).agent.td_threshold == 0.1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"buffer.floor": 0.1}, True),
        ({"agent.td_threshold": 0.1}, True),
        ({"buffer.floor": 0.1, "agent.td_threshold": 0.1}, False),
        ({"buffer.floor": 0.1, "agent.td_loss": "auto", "agent.td_threshold": 1.0}, False),
        ({}, False),
    ],
)
def test_laps_floor_and_threshold_are_told_where_they_part(
    options: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = train_config({"agent": "ddqn_lap", "env": "CartPole-v1", "device": "cpu", **options})
    found: Any = resolve_config(config)
    floor = found.buffer.floor
    words = f"they are one number; give buffer.floor={floor:g} agent.td_threshold={floor:g}"
    assert (words in caplog.text) == told
    assert (floor == found.agent.td_threshold) != told


TESTED = list(itertools.product(("scalar", "categorical", "quantile"), (False, True), (False, True), (None, 0.5)))
"""Form of values, double, dueling, noisy: every one of them together."""


@pytest.mark.parametrize(("values", "double", "dueling", "noisy"), TESTED)
def test_every_combination_learns_what_an_action_is_worth(values, double, dueling, noisy, make_batch) -> None:
    config = DQNConfig(
        values=values, double=double, dueling=dueling, noisy=noisy, atoms=None if values == "scalar" else 9,
        network=NetworkConfig(hidden=(16,)), warmup_steps=0, learning_rate=1e-2,
        optimiser=OptimiserConfig(), v_min=-2.0 if values == "categorical" else None,
        v_max=2.0 if values == "categorical" else None,
    )  # fmt: skip
    agent = DQN(OBSERVATION, CHOICE, config)
    rows = make_batch(agent, 0, size=32)
    rows = rows._replace(reward=(rows.action == 3).float(), terminated=torch.ones(32))
    first = agent.update(rows).metrics["critic_loss"]
    for _ in range(60):
        last = agent.update(rows).metrics["critic_loss"]
    assert last < first
    assert (agent.act(rows.obs, deterministic=True).action == 3).float().mean() > 0.9
    assert agent.guard.first_bad() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atoms": 51}, "agent.atoms=51 has no effect without agent.values=categorical or agent.values=quantile"),
        ({"values": "quantile", "v_min": 0.0}, "agent.v_min=0.0 has no effect without agent.values=categorical"),
        ({"values": "categorical", "td_loss": "huber"}, "agent.td_loss=huber is of residuals"),
        ({"values": "quantile", "td_loss": "pal"}, "agent.td_loss=pal is of residuals"),
        ({"network": NetworkConfig(init="orthogonal", policy_gain=0.1)}, "there is no policy network"),
        ({"network": NetworkConfig(memory="gru"), "noisy": 0.5}, "agent.noisy is not combined with"),
        ({"values": "categorical", "v_min": 3.0, "v_max": 2.0}, "low < high, not 51 from 3 to 2"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str, make_agent) -> None:
    with pytest.raises(RloptError, match=re.escape(message)):
        make_agent("dqn", **options)


@pytest.mark.parametrize("name", ["c51", "qr_dqn", "rainbow"])
def test_laps_loss_belongs_to_residuals(name: str) -> None:
    options = {"agent": name, "env": "CartPole-v1", "device": "cpu", "buffer": "lap"}
    with pytest.raises(RloptError, match=f"buffer=lap belongs with a loss of residuals, and agent={name} has another"):
        resolve_config(train_config(options))


# ---- what is exported


@pytest.mark.parametrize("name", ["dqn", "rainbow"])
def test_the_policy_acts_as_it_is_evaluated(name: str, make_agent, tmp_path) -> None:
    agent = make_agent(name, evaluation_epsilon=0.25, epsilon_end=0.5)
    assert agent.policy.evaluation_mode == EvaluationMode(True, 0.25)
    save_policy(agent.policy, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert policy.evaluation_mode == EvaluationMode(True, 0.25) and policy.actor.epsilon == 0.5  # type: ignore[attr-defined]
    obs = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    greedy = agent.act(obs, deterministic=True).action
    assert torch.equal(policy.act(obs).action, greedy)
    g = torch.Generator().manual_seed(1)
    evaluated = policy.act_as(policy.evaluation_mode, obs, generator=g).action
    assert (evaluated == greedy).float().mean().item() == pytest.approx(0.75 + 0.25 / 3, abs=0.03)


# ---- a real run


def test_cartpole_is_learnt() -> None:
    """A short run is far better than chance (a random policy balances for about 22 steps)."""
    loop = make_loop(
        train_config({
            "agent": "dqn", "env": {"id": "CartPole-v1", "backend": "torch"}, "device": "cpu", "seed": 1, "threads": 1,
            "total_steps": 8_000, "num_envs": 8, "buffer.capacity": 8_000,
            "agent.learning_rate": 1e-3, "agent.batch_size": 64, "agent.update_ratio": [1, 8],
            "agent.warmup_steps": 500, "agent.epsilon_steps": 3_000, "agent.epsilon_end": 0.05,
            "agent.target_every": 400, "agent.network.hidden": [64, 64], "agent.double": True,
        })
    )  # fmt: skip
    while loop.step < loop.total_steps:
        loop.advance()
    returns = [episode.total_reward for episode in loop.evaluate(4)]
    loop.close()
    assert min(returns) > 60.0, returns


# ---- Stable-Baselines3


def test_updates_are_stable_baselines3s(monkeypatch: pytest.MonkeyPatch) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    import gymnasium
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    observation, actions, rows = spaces.Box(-10, 10, (5,)), spaces.Discrete(3), 32

    class Nowhere(gymnasium.Env[Any, Any]):
        observation_space, action_space = observation, actions

    theirs = sb3.DQN(
        "MlpPolicy", Nowhere(), learning_rate=1e-3, batch_size=rows, gamma=0.9, max_grad_norm=1.0, seed=0, device="cpu",
        policy_kwargs={"net_arch": [16, 16], "optimizer_kwargs": {"eps": 1e-4}}, buffer_size=10,
    )  # fmt: skip
    theirs.set_logger(Logger(None, []))
    config = DQNConfig(
        learning_rate=1e-3, gamma=0.9, max_grad_norm=1.0, network=NetworkConfig(hidden=(16, 16)),
        optimiser=OptimiserConfig(epsilon=1e-4), target_counts="updates", target_every=1_000,
    )  # fmt: skip
    ours = DQN(observation, actions, config)

    def copy(net: Net, their_net: Any) -> None:
        layers = [layer for layer in their_net.q_net if isinstance(layer, torch.nn.Linear)]
        module = net.module
        assert isinstance(module, QActor)
        with torch.no_grad():
            for layer, other in zip(module.body.layers, layers, strict=True):
                layer.weight.copy_(other.weight)
                layer.bias.copy_(other.bias)

    copy(ours.critic, theirs.q_net)
    copy(ours.target, theirs.q_net_target)
    for i in range(10):
        g = torch.Generator().manual_seed(i)
        obs, next_obs = torch.randn(2, rows, 5, generator=g)
        action, reward = torch.randint(3, (rows,), generator=g), 3.0 * torch.randn(rows, generator=g)
        ended = (torch.rand(rows, generator=g) < 0.2).float()
        samples = ReplayBufferSamples(obs, action[:, None], next_obs, ended[:, None], reward[:, None])
        monkeypatch.setattr(theirs.replay_buffer, "sample", lambda *_, s=samples, **__: s)
        theirs.train(1, rows)
        discount = torch.full((rows,), 0.9)
        update = ours.update(Batch(obs, action, reward, next_obs, ended, discount, None, torch.arange(rows)))
        their_loss = theirs.logger.name_to_value["train/loss"]
        assert float(update.metrics["critic_loss"]) == pytest.approx(their_loss, rel=1e-4)
    check = DQN(observation, actions, config)
    copy(check.critic, theirs.q_net)
    torch.testing.assert_close(ours.critic.flat, check.critic.flat, rtol=0.0, atol=1e-5)


def test_every_name_of_the_family_is_this_class() -> None:
    from rlopt.registry import get_agent

    assert [name for name in AGENTS if get_agent(name) is DQN] == ["dqn", "c51", "ddqn_lap", "qr_dqn", "rainbow"]

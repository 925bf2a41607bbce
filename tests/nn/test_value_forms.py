"""What a network's numbers say about the return, against numbers by hand and slow loops; noisy and dueling layers."""

from __future__ import annotations

import math

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.nn import NetworkConfig, QActor
from rlopt.nn.noisy import NoisyLinear, NoisyMLP, QBody
from rlopt.nn.values import CategoricalValues, QuantileValues, ScalarValues
from rlopt.types import RloptError

SPACE, THREE = spaces.Box(-1.0, 1.0, (4,)), spaces.Discrete(3, start=2)


def slow_projection(p: Tensor, reward: float, discount: float, low: float, high: float) -> list[float]:
    """Algorithm 1 of Bellemare et al. 2017, as it is printed."""
    n = len(p)
    gap = (high - low) / (n - 1)
    m = [0.0] * n
    for j in range(n):
        landed = min(max(reward + discount * (low + j * gap), low), high)
        b = (landed - low) / gap
        lower, upper = math.floor(b + 1e-9), math.ceil(b - 1e-9)
        if lower == upper:  # the printed one loses this mass
            m[lower] += float(p[j])
        else:
            m[lower] += float(p[j]) * (upper - b)
            m[upper] += float(p[j]) * (b - lower)
    return m


def test_the_projection_is_the_papers() -> None:
    values = CategoricalValues(7, -2.0, 4.0)
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    reward, discount = torch.tensor([0.0, 1.0, 0.3, -9.0, 2.5, 0.7]), torch.tensor([1.0, 0.5, 0.9, 0.9, 0.0, 0.99])
    found = values.goal(logits, reward, discount)
    for row, p, r, d in zip(found, logits.softmax(-1), reward.tolist(), discount.tolist(), strict=True):
        assert row.tolist() == pytest.approx(slow_projection(p, r, d, -2.0, 4.0), abs=1e-5)
    assert found.sum(-1).tolist() == pytest.approx([1.0] * 6, abs=1e-6)
    assert found[3].tolist() == pytest.approx([1.0] + [0.0] * 6, abs=1e-6)  # all of it below the lowest atom
    assert found[4].tolist() == pytest.approx([0.0] * 4 + [0.5, 0.5, 0.0], abs=1e-6)  # the end of an episode, at 2.5


def test_categorical_means_and_errors_by_hand() -> None:
    values = CategoricalValues(3, -1.0, 1.0)
    logits = torch.tensor([[0.0, math.log(2.0), 0.0]])  # probabilities ¼ ½ ¼
    assert values.mean(logits).tolist() == pytest.approx([0.0])
    assert values.mean(torch.tensor([[0.0, 0.0, math.log(2.0)]])).tolist() == pytest.approx([0.25])
    goal = torch.tensor([[0.5, 0.5, 0.0]])
    assert values.error(logits, goal).tolist() == pytest.approx([0.5 * math.log(4.0) + 0.5 * math.log(2.0)])
    for size, low, high in ((1, -1.0, 1.0), (3, 1.0, 1.0)):
        with pytest.raises(RloptError, match="two atoms and low < high"):
            CategoricalValues(size, low, high)


def test_the_quantile_loss_by_hand() -> None:
    """Two quantiles at ¼ and ¾; goals 0 and 3 against θ = (1, 1.5)."""
    values = QuantileValues(2)
    goal = values.goal(torch.tensor([[-1.0, 5.0]]), torch.tensor([0.5]), torch.tensor([0.5]))
    assert goal.tolist() == [[0.0, 3.0]]
    # θ₁ = 1, τ = ¼: u = -1 weighs ¾ and costs ½; u = 2 weighs ¼ and costs 1.5.
    # θ₂ = 1.5, τ = ¾: u = -1.5 weighs ¼ and costs 1; u = 1.5 weighs ¾ and costs 1.
    expected = (0.75 * 0.5 + 0.25 * 1.5) / 2 + (0.25 * 1.0 + 0.75 * 1.0) / 2
    assert values.error(torch.tensor([[1.0, 1.5]]), goal).tolist() == pytest.approx([expected])
    assert values.mean(torch.tensor([[1.0, 1.5]])).tolist() == [1.25]


def test_quantiles_of_a_known_distribution_are_found() -> None:
    """Of the numbers 0 … 99 the minimiser at ¼ lies near 25, that at ¾ near 75."""
    values, theta = QuantileValues(2), torch.full((1, 2), 50.0, requires_grad=True)
    goal, optimiser = torch.arange(100.0)[None], torch.optim.Adam([theta], 0.5)
    for _ in range(200):
        optimiser.zero_grad()
        values.error(theta, goal).sum().backward()
        optimiser.step()
    assert theta.flatten().tolist() == pytest.approx([24.5, 74.5], abs=1.5)


def test_scalar_values_by_hand() -> None:
    values = ScalarValues()
    goal = values.goal(torch.tensor([[2.0], [7.0]]), torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.0]))
    assert goal.flatten().tolist() == pytest.approx([2.8, 1.0])
    assert values.error(torch.tensor([[1.0], [2.0]]), goal).tolist() == pytest.approx([-1.8, 1.0])


# ---- layers


def test_a_noisy_layer_by_hand() -> None:
    layer = NoisyLinear(2, 1, sigma=0.5)
    start = 0.5 / math.sqrt(2.0)
    assert torch.equal(layer.weight_sigma, torch.full((1, 2), start)) and layer.weight.abs().max() <= 1 / math.sqrt(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.fill_(3.0)
        layer.weight_sigma.copy_(torch.tensor([[0.1, 0.2]]))
        layer.bias_sigma.fill_(0.3)
    noise = torch.tensor([4.0, -9.0, 16.0])  # f: 2, -3 for the inputs and 4 for the output
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).item() == 6.0
    assert layer(x, noise).item() == pytest.approx((1 + 0.1 * 4 * 2) + (2 + 0.2 * 4 * -3) + (3 + 0.3 * 4))


def test_the_same_noise_gives_the_same_output() -> None:
    net = NoisyMLP(4, 2, NetworkConfig(hidden=(8,)))
    x, g = torch.randn(5, 4), torch.Generator().manual_seed(0)
    one, two = torch.randn(2, net.noise_size, generator=g)
    assert net.noise_size == (4 + 8) + (8 + 2)
    assert torch.equal(net(x, one), net(x, one)) and torch.equal(net(x), net(x))
    assert not torch.equal(net(x, one), net(x, two)) and not torch.equal(net(x, one), net(x))
    mapped = torch.vmap(lambda noise: net(x, noise))(torch.stack([one, two]))
    torch.testing.assert_close(mapped, torch.stack([net(x, one), net(x, two)]))


def test_two_streams_by_hand() -> None:
    body = QBody(3, 2, 1, NetworkConfig(hidden=()), dueling=True, sigma=None)
    assert body.value is not None
    x = torch.randn(4, 3)
    advantage, value = body.main(x), body.value(x)
    expected = value + advantage - advantage.mean(-1, keepdim=True)
    torch.testing.assert_close(body(x).squeeze(-1), expected)
    torch.testing.assert_close(body(x).squeeze(-1).mean(-1), value.squeeze(-1))


# ---- acting


def test_the_actor_explores_as_often_as_it_is_told() -> None:
    actor = QActor(SPACE, THREE, {"hidden": [8]})
    g, obs = torch.Generator().manual_seed(0), torch.zeros(3000, 4)
    greedy, _ = actor.act(obs, deterministic=True)
    assert (greedy == greedy[0]).all() and torch.equal(actor.act(obs, generator=g)[0], greedy)
    best = int(greedy[0])
    for epsilon, share in ((0.3, 0.8), (1.0, 1 / 3)):  # a random action may be the best one
        chosen = actor.choose(actor(obs), actor.noise(3000, g, epsilon))
        assert (chosen == best).float().mean().item() == pytest.approx(share, abs=0.03)
        assert set(chosen.tolist()) == {2, 3, 4}
    assert QActor(SPACE, THREE, {"hidden": [8], "epsilon": 0.3}).epsilon == 0.3


@pytest.mark.parametrize("values", ["scalar", "categorical", "quantile"])
def test_masked_actions_are_never_taken(values: str) -> None:
    space = spaces.Dict(obs=SPACE, action_mask=spaces.MultiBinary(3))
    actor = QActor(space, THREE, {"hidden": [8], "values": values, "size": 1 if values == "scalar" else 5})
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, False, True]]).expand(500, 3).clone()
    mask[:100] = torch.tensor([False, False, True])
    obs = {"obs": torch.randn(500, 4, generator=g), "action_mask": mask}
    for action in (
        actor.act(obs, deterministic=True)[0],
        actor.choose(actor(obs), actor.noise(500, g, 1.0)),
        actor.uniform(500, g, obs),
    ):
        assert mask[torch.arange(500), action - 2].all()
    assert set(actor.uniform(500, g, obs)[100:].tolist()) == {2, 4}


def test_what_values_cannot_be_learnt_of_is_refused() -> None:
    with pytest.raises(RloptError, match=r"values are learnt of Discrete .* use agent=sac"):
        QActor(SPACE, spaces.Box(-1.0, 1.0, (2,)), {})
    with pytest.raises(RloptError, match="values=normal: no such form of values"):
        QActor(SPACE, THREE, {"values": "normal"})


# ---- networks of images


@pytest.mark.parametrize(
    ("shape", "options", "encoder", "widths"),
    [
        ((4, 84, 84), {}, "PerLeaf", [512, 3]),
        ((4, 84, 84), {"dueling": True}, "NatureConv", [64 * 7 * 7, 512, 3]),
        ((4, 84, 84), {"sigma": 0.5}, "NatureConv", [64 * 7 * 7, 512, 3]),
        ((4, 84, 84), {"hidden": [16]}, "PerLeaf", [512, 16, 3]),
        ((4, 84, 84), {"encoder": "impala_cnn"}, "ImpalaCNN", [256, 3]),
        ((10, 10, 6), {"dueling": True}, "PerLeaf", [128, 3]),
        ((4, 84, 84), {"encoder": "flatten"}, "Flatten", [4 * 84 * 84, 256, 256, 3]),
    ],
)
def test_hidden_layers_that_are_left_open(shape, options, encoder, widths) -> None:
    image = spaces.Box(0, 255, shape, "uint8")
    with torch.device("meta"):
        actor = QActor(image, THREE, {"hidden": None, **options})
    assert type(actor.encoder).__name__ == encoder
    found = [layer.in_features for layer in actor.body.layers] + [actor.body.layers[-1].out_features]
    assert found == widths

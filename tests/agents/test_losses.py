"""Every loss against numbers worked out by hand, with stub networks in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, distributions

from rlopt.agents import sac, sac_2018, sac_discrete
from rlopt.agents.actor_critic import Nets
from rlopt.agents.temperature import temperature_loss
from rlopt.buffers import Batch
from rlopt.nn import Params
from rlopt.nn.distributions import squashed_gaussian

D = torch.float64
HALF_LOG_2PI = 0.9189385332046727
TANH_HALF = 0.46211715726000973
LOG_DET_HALF = -0.24022901391655505  # log(1 - tanh²(1/2))
ALPHA = torch.tensor(0.5, dtype=D)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


def gaussian(params: Params, obs: Tensor) -> tuple[Tensor, Tensor]:
    """One action: mean m·s, log standard deviation l."""
    return params["m"] * obs, params["l"].expand_as(obs)


def critic(params: Params, obs: Tensor, action: Tensor) -> Tensor:
    """Two critics Qᵢ(s, a) = wᵢ s + vᵢ a."""
    return params["w"][:, None] * obs[:, 0] + params["v"][:, None] * action[:, 0]


ACTOR: Params = {"m": t(1.0), "l": t(0.0)}
CRITIC: Params = {"w": t(1.0, 0.0), "v": t(0.0, 2.0)}
TARGET: Params = {"w": t(1.0, 2.0), "v": t(1.0, -1.0)}


def three_rows(weight: Tensor | None = None) -> Batch:
    """A step that goes on, one that terminates, and a 3-step window that ends in a truncation (γ = 0.9)."""
    return Batch(
        obs=t(1.0, 2.0, -1.0)[:, None],
        action=t(0.5, -0.5, 0.0)[:, None],
        reward=t(1.0, -1.0, 2.5),
        next_obs=t(0.0, 3.0, 0.5)[:, None],
        terminated=t(0.0, 1.0, 0.0),
        discount=t(0.9, 0.9, 0.729),
        weight=weight,
        index=torch.arange(3),
    )


# With noise 0, u' = s'. Row 0: a' = 0, log π = -½log 2π, min Q̄ = 0, value 0 + α·0.9189385 = 0.4594693,
#   y = 1 + 0.9·0.4594693 = 1.4135223.
# Row 1 terminates: y = -1.
# Row 2: a' = tanh ½, log π = -0.9189385 + 0.2402290 = -0.6787095, Q̄ = (0.5 + 0.4621172, 1 - 0.4621172), min 0.5378828,
#   value 0.5378828 + ½·0.6787095 = 0.8772376, y = 2.5 + 0.729·0.8772376 = 3.1395062.
# Q₁ = s = (1, 2, -1), Q₂ = 2a = (1, -1, 0): residuals (-0.4135223, 3, -4.1395062) and (-0.4135223, 0, -3.1395062).
Y = (
    1.0 + 0.9 * 0.5 * HALF_LOG_2PI,
    -1.0,
    2.5 + 0.729 * ((1.0 - TANH_HALF) + 0.5 * (HALF_LOG_2PI + LOG_DET_HALF)),
)
RESIDUALS = ((1.0 - Y[0], 3.0, -1.0 - Y[2]), (1.0 - Y[0], 0.0, -Y[2]))


def test_the_constants_above_are_the_numbers_in_the_comment() -> None:
    assert list(Y) == pytest.approx([1.4135223, -1.0, 3.1395062], abs=1e-7)
    assert math.log(1 - math.tanh(0.5) ** 2) == pytest.approx(LOG_DET_HALF, abs=1e-14)


def test_sac_critic_loss() -> None:
    nets = Nets(gaussian, critic)
    loss, metrics = sac.critic_loss(nets, CRITIC, ACTOR, TARGET, ALPHA, three_rows(), torch.zeros(3, 1, dtype=D))
    # ½·(0.1710007 + 9 + 17.1355119)/3 + ½·(0.1710007 + 0 + 9.8564994)/3 = 4.3844188 + 1.6712500
    assert loss.item() == pytest.approx(6.0556688, abs=1e-6)
    assert metrics["q"].item() == pytest.approx((1 + 2 - 1 + 1 - 1 + 0) / 6)
    expected_td = [(abs(a) + abs(b)) / 2 for a, b in zip(*RESIDUALS, strict=True)]
    assert metrics["td"].tolist() == pytest.approx(expected_td)  # (0.4135223, 1.5, 3.6395062)


def test_sac_critic_loss_with_importance_weights() -> None:
    nets = Nets(gaussian, critic)
    batch = three_rows(t(1.0, 0.5, 2.0))
    loss, _ = sac.critic_loss(nets, CRITIC, ACTOR, TARGET, ALPHA, batch, torch.zeros(3, 1, dtype=D))
    # ½·(0.1710007 + 4.5 + 34.2710239)/3 + ½·(0.1710007 + 0 + 19.7129988)/3 = 6.4903374 + 3.3139999
    assert loss.item() == pytest.approx(9.8043374, abs=1e-6)


def test_sac_critic_gradient_reaches_the_critics_alone() -> None:
    nets = Nets(gaussian, critic)
    trees = [{k: v.clone().requires_grad_() for k, v in tree.items()} for tree in (CRITIC, ACTOR, TARGET)]
    loss, _ = sac.critic_loss(nets, *trees, ALPHA, three_rows(), torch.zeros(3, 1, dtype=D))
    loss.backward()
    s = (1.0, 2.0, -1.0)
    # dJ/dwᵢ = mean (residual·s)
    expected = [sum(r * x for r, x in zip(row, s, strict=True)) / 3 for row in RESIDUALS]
    assert trees[0]["w"].grad.tolist() == pytest.approx(expected)
    assert all(leaf.grad is None for tree in trees[1:] for leaf in tree.values())


def test_sac_target_reads_terminated_and_not_truncated() -> None:
    """Only ``terminated`` cuts the bootstrap: the third row ended by truncation and still bootstraps with γ³."""
    nets = Nets(gaussian, critic)
    noise = torch.zeros(3, 1, dtype=D)
    cut = three_rows()._replace(terminated=t(1.0, 1.0, 1.0))
    _, going = sac.critic_loss(nets, CRITIC, ACTOR, TARGET, ALPHA, three_rows(), noise)
    _, ended = sac.critic_loss(nets, CRITIC, ACTOR, TARGET, ALPHA, cut, noise)
    # With the bootstrap cut y = r: |1-1|, and (|-1-2.5| + |0-2.5|)/2 = 3.
    assert ended["td"].tolist() == pytest.approx([0.0, 1.5, 3.0])
    assert going["td"][1] == ended["td"][1]


def test_sac_actor_loss_and_its_gradient() -> None:
    nets = Nets(gaussian, critic)
    params = {"m": t(1.0).requires_grad_(), "l": t(math.log(0.5)).requires_grad_()}
    obs, noise = t(0.5, 0.0)[:, None], t(0.0, 1.0)[:, None]
    loss, metrics = sac.actor_loss(nets, params, {"w": t(1.0, 2.0), "v": t(1.0, 1.0)}, ALPHA, obs, noise)
    # Both rows have u = ½ (0.5 + 0.5·0 and 0 + 0.5·1), so a = tanh ½.
    # log π = -½ε² - log ½ - ½log 2π - log det: 0.0144377 and -0.4855623.
    expected = [-0.5 * e * e + math.log(2.0) - HALF_LOG_2PI - LOG_DET_HALF for e in (0.0, 1.0)]
    assert expected == pytest.approx([0.0144377, -0.4855623], abs=1e-7)
    assert metrics["log_prob"].tolist() == pytest.approx(expected)
    # min Q = (0.5 + a, 0 + a)
    value = sum(0.5 * lp - q for lp, q in zip(expected, (0.5 + TANH_HALF, TANH_HALF), strict=True)) / 2
    assert loss.item() == pytest.approx(value)
    loss.backward()
    # dJ/du = α·2 tanh u - (1 - a²) = a - (1 - a²) with α = ½ and dQ/da = 1. dJ/dm = mean (dJ/du·s),
    # dJ/dl = mean (dJ/du·σε - α).
    slope = TANH_HALF - (1.0 - TANH_HALF**2)
    assert params["m"].grad.item() == pytest.approx(slope * 0.5 / 2)
    assert params["l"].grad.item() == pytest.approx((slope * 0.0 + slope * 0.5) / 2 - 0.5)


def test_sac_actor_loss_takes_the_smaller_critic_row_by_row() -> None:
    nets = Nets(gaussian, critic)
    obs, noise = t(1.0, -1.0)[:, None], torch.zeros(2, 1, dtype=D)
    # Q = (s, 2s): 1 for s = 1 and -2 for s = -1; α = 0.
    loss, _ = sac.actor_loss(nets, ACTOR, {"w": t(1.0, 2.0), "v": t(0.0, 0.0)}, t(0.0)[0], obs, noise)
    assert loss.item() == pytest.approx(-(1.0 - 2.0) / 2)


def test_temperature_loss_and_its_direction() -> None:
    log_temperature = t(math.log(0.2)).requires_grad_()
    loss = temperature_loss(log_temperature, t(-1.0, -3.0), target_entropy=-1.0)
    # -0.2·mean(-1 - 1, -3 - 1) = 0.6; d/d log α is the same number. The entropy (2) exceeds the target (-1), so α
    # must fall.
    assert loss.item() == pytest.approx(0.6)
    loss.backward()
    assert log_temperature.grad.item() == pytest.approx(0.6)


# --- the squashed Gaussian ------------------------------------------------------------------------------------------


def test_log_prob_equals_torch_distributions() -> None:
    g = torch.Generator().manual_seed(0)
    mean, log_std, noise = (torch.randn(50, 3, dtype=D, generator=g) for _ in range(3))
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    base = distributions.Normal(mean, log_std.exp())
    squashed = distributions.TransformedDistribution(base, distributions.TanhTransform(cache_size=1))
    u = mean + log_std.exp() * noise
    torch.testing.assert_close(action, torch.tanh(u), rtol=0, atol=1e-15)
    by_hand = base.log_prob(u) - torch.log1p(-torch.tanh(u).square())
    moderate = (u.abs() < 3).all(-1)
    assert moderate.sum() > 20
    torch.testing.assert_close(log_prob[moderate], by_hand.sum(-1)[moderate], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_prob[moderate], squashed.log_prob(action).sum(-1)[moderate], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("u", [-50.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_is_finite_where_tanh_saturates(u: float, dtype: torch.dtype) -> None:
    mean = torch.tensor([[u]], dtype=dtype, requires_grad=True)
    _, log_prob = squashed_gaussian(mean, torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))
    # log det = 2(log 2 - |u|) up to exp(-2|u|)
    assert log_prob.item() == pytest.approx(-HALF_LOG_2PI - 2 * (math.log(2.0) - 50.0), rel=1e-6)
    log_prob.sum().backward()
    assert mean.grad.item() == pytest.approx(math.copysign(2.0, u))


@pytest.mark.parametrize("name", ["sac", "sac_2018"])
def test_log_prob_does_not_depend_on_the_bounds_of_the_action_space(name: str, make_agent, make_batch) -> None:
    """Humanoid's bound is 0.4: a scale inside the density would shift its entropy by 17 log 0.4 = -15.6 nats."""
    wide = make_agent(name, action_space=spaces.Box(-1.0, 1.0, (2,)))
    narrow = make_agent(name, action_space=spaces.Box(-0.4, 0.4, (2,)))
    batch = make_batch(wide, 0)
    a, b = wide.update(batch), narrow.update(batch._replace(action=batch.action * 0.4))
    for key in a.metrics:
        torch.testing.assert_close(a.metrics[key], b.metrics[key], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide.actor.flat, narrow.actor.flat, rtol=1e-4, atol=1e-6)
    if name == "sac":
        assert wide.temperature.target_entropy == narrow.temperature.target_entropy == -2.0


def test_asymmetric_bounds_map_both_ways(make_agent) -> None:
    box = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32))
    actor = make_agent("sac", action_space=box).actor_module
    normalised = torch.tensor([[-1.0, 1.0], [0.0, 0.5]])
    assert actor.to_env(normalised).tolist() == [[-1.0, 10.0], [1.0, 7.5]]
    assert actor.normalise(torch.tensor([[-1.0, 10.0], [1.0, 7.5]])).tolist() == normalised.tolist()


# --- SAC 2018 -------------------------------------------------------------------------------------------------------


def state_value(params: Params, obs: Tensor) -> Tensor:
    """V(s) = c s + d, (1, B)."""
    return (params["c"] * obs[:, 0] + params["d"])[None]


FIRST = sac_2018.ValueNets(gaussian, critic, state_value)


def test_sac_2018_value_loss() -> None:
    params = {"c": t(2.0).requires_grad_(), "d": t(0.0).requires_grad_()}
    obs = t(0.0, 0.5)[:, None]
    loss, metrics = sac_2018.value_loss(FIRST, params, ACTOR, TARGET, obs, torch.zeros(2, 1, dtype=D))
    # Row 0: min Q(0, 0) = 0, y = 0 + 0.9189385.
    # Row 1: min Q(½, tanh ½) = 0.5378828, y = 0.5378828 + 0.6787095 = 1.2165924.
    # V = (0, 1): residuals (-0.9189385, -0.2165924), J = ½·(0.8444480 + 0.0469123)/2.
    residuals = (-HALF_LOG_2PI, 1.0 - (1.0 - TANH_HALF + HALF_LOG_2PI + LOG_DET_HALF))
    assert residuals == pytest.approx((-0.9189385, -0.2165924), abs=1e-7)
    assert loss.item() == pytest.approx(0.2228401, abs=1e-7)
    assert metrics["v"].item() == pytest.approx(0.5)
    loss.backward()
    assert params["d"].grad.item() == pytest.approx(sum(residuals) / 2)  # dJ/dd = mean residual
    assert params["c"].grad.item() == pytest.approx(residuals[1] * 0.5 / 2)


def test_sac_2018_critic_loss() -> None:
    params = {"c": t(2.0), "d": t(1.0)}
    loss, metrics = sac_2018.critic_loss(FIRST, CRITIC, params, three_rows(t(1.0, 1.0, 2.0)), 5.0)
    # V̄(s') = 2s' + 1 = (1, 7, 2): y = (5 + 0.9, -5, 12.5 + 0.729·2) = (5.9, -5, 13.958).
    # Residuals of Q₁ = (1, 2, -1): (-4.9, 7, -14.958); of Q₂ = (1, -1, 0): (-4.9, 4, -13.958).
    # J = ½·(24.01 + 49 + 2·223.741764)/3 + ½·(24.01 + 16 + 2·194.825764)/3 = 86.748921 + 71.610255
    assert loss.item() == pytest.approx(158.359176, abs=1e-5)
    assert metrics["td"].tolist() == pytest.approx([4.9, 5.5, 14.458])


def test_sac_2018_actor_loss() -> None:
    params = {"m": t(1.0), "l": t(-1.0)}
    obs, noise = t(0.5, -0.5)[:, None], torch.zeros(2, 1, dtype=D)
    plain, _ = sac_2018.actor_loss(FIRST, params, TARGET, obs, noise, 0.0)
    # log π = 1 - ½log 2π - log det = 0.3212905 for u = ±½. Q = (s + a, 2s - a) with a = ±0.4621172:
    # min (0.9621172, 0.5378828) and min (-0.9621172, -0.5378828).
    log_prob = 1.0 - HALF_LOG_2PI - LOG_DET_HALF
    assert log_prob == pytest.approx(0.3212905, abs=1e-7)
    assert plain.item() == pytest.approx(log_prob - (0.5378828 - 0.9621172) / 2, abs=1e-7)
    regularised, _ = sac_2018.actor_loss(FIRST, params, TARGET, obs, noise, 0.1)
    # ½ (mean μ² + mean (log σ)²) = ½ (0.25 + 1) = 0.625
    assert (regularised - plain).item() == pytest.approx(0.1 * 0.625)


# --- discrete SAC ---------------------------------------------------------------------------------------------------


def logits(params: Params, obs: Tensor) -> Tensor:
    """Two actions with logits (k s, 0)."""
    return torch.stack([params["k"] * obs[:, 0], torch.zeros_like(obs[:, 0])], -1)


def vector_critic(params: Params, obs: Tensor) -> Tensor:
    """Qᵢ(s, ·) = qᵢ + s, (2, B, 2)."""
    return params["q"][:, None, :] + obs[None]


LOG3 = math.log(3.0)
DISCRETE = Nets(logits, vector_critic)
POLICY: Params = {"k": t(LOG3)}  # s = 1: π = (¾, ¼); s = 0: π = (½, ½)
VALUES: Params = {"q": torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=D)}  # minimum (1, 0), mean (2, 1)
ENTROPY = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # 0.5623351


def discrete_rows() -> Batch:
    return Batch(
        obs=t(0.0, 1.0)[:, None],
        action=torch.tensor([1, 0]),
        reward=t(1.0, 2.0),
        next_obs=t(1.0, 0.0)[:, None],
        terminated=t(0.0, 1.0),
        discount=t(0.81, 0.9),
        weight=None,
        index=torch.arange(2),
    )


@pytest.mark.parametrize(
    ("average", "entropy", "value"),
    [
        # s' = 1, so π = (¾, ¼) and min Q̄ = (2, 1): 1.75, plus ½·0.5623351.
        (False, True, 1.75 + 0.5 * ENTROPY),
        (False, False, 1.75),
        # mean Q̄ = (3, 2): 2.75
        (True, True, 2.75 + 0.5 * ENTROPY),
        (True, False, 2.75),
    ],
)
def test_discrete_critic_loss(average: bool, entropy: bool, value: float) -> None:
    loss, metrics = sac_discrete.critic_loss(
        DISCRETE, VALUES, POLICY, VALUES, ALPHA, discrete_rows(), average=average, entropy=entropy
    )
    # y = (1 + 0.81·value, 2). Q(0, 1) = (2, 0), Q(1, 0) = (2, 4).
    y = 1.0 + 0.81 * value
    assert loss.item() == pytest.approx(0.5 * ((2 - y) ** 2 + 0.0) / 2 + 0.5 * ((0 - y) ** 2 + 4.0) / 2)
    assert metrics["td"].tolist() == pytest.approx([(abs(2 - y) + abs(y)) / 2, 1.0])
    assert metrics["q"].item() == pytest.approx(2.0)


def test_discrete_critic_loss_with_weights() -> None:
    batch = discrete_rows()._replace(weight=t(2.0, 0.5), terminated=t(1.0, 1.0))
    loss, _ = sac_discrete.critic_loss(DISCRETE, VALUES, POLICY, VALUES, ALPHA, batch)
    # y = (1, 2): residuals (1, 0) and (-1, 2), squares weighted (2·1 + 0)/2 and (2·1 + 0.5·4)/2.
    assert loss.item() == pytest.approx(0.5 * 1.0 + 0.5 * 2.0)


@pytest.mark.parametrize(("average", "q"), [(False, (1.0, 0.0)), (True, (2.0, 1.0))])
def test_discrete_actor_loss_and_its_gradient(average: bool, q: tuple[float, float]) -> None:
    params = {"k": t(LOG3).requires_grad_()}
    loss, metrics = sac_discrete.actor_loss(DISCRETE, params, VALUES, ALPHA, t(1.0)[:, None], average=average)
    # π = (¾, ¼), Q = q + 1: J = -½·0.5623351 - (¾ Q₀ + ¼ Q₁).
    assert loss.item() == pytest.approx(-0.5 * ENTROPY - (0.75 * (q[0] + 1) + 0.25 * (q[1] + 1)))
    assert metrics["log_prob"].item() == pytest.approx(-ENTROPY)
    loss.backward()
    # dJ/dk with z = k s: π₀π₁ [α (log π₀ - log π₁) - (Q₀ - Q₁)] s = 3/16 (½ log 3 - 1).
    assert params["k"].grad.item() == pytest.approx(3 / 16 * (0.5 * LOG3 - 1.0))


def test_discrete_target_is_copied_now_and_then(make_agent, make_batch) -> None:
    agent, copies = make_agent("sac_discrete", target_every=3, tau=1.0), []
    for update in range(1, 8):
        before = agent.target.flat.clone()
        agent.update(make_batch(agent, update))
        if not torch.equal(agent.target.flat, before):
            copies.append(update)
            assert torch.equal(agent.target.flat, agent.critic.flat)
    assert copies == [3, 6]


def test_discrete_target_entropy_is_a_fraction_of_log_of_the_actions(make_agent) -> None:
    assert make_agent("sac_discrete").temperature.target_entropy == pytest.approx(0.98 * math.log(3))
    assert make_agent("sac_discrete", target_entropy_ratio=0.5).temperature.target_entropy == pytest.approx(
        0.5 * math.log(3)
    )

"""Acting networks: kinds, action scales, degenerate and extreme spaces."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from rlopt.nn import (
    CategoricalActor,
    Critic,
    DeterministicActor,
    GaussianActor,
    MultiCategoricalActor,
    Net,
    NetworkConfig,
    SquashedGaussianActor,
    TabularActor,
    build_seeded,
    make_actor,
    network_options,
)
from rlopt.nn.distributions import categorical, gaussian_entropy, gaussian_log_prob, possible, squashed_gaussian
from rlopt.policy import Policy, load_policy, save_policy
from rlopt.types import EnvSpec, RloptError

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
SMALL = NetworkConfig(hidden=(8,))
OPTIONS = network_options(SMALL)
LOPSIDED = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([4.0, 0.5], np.float32))
HALF_OPEN = spaces.Box(np.array([-np.inf, 1.0, -3.0]), np.array([np.inf, np.inf, -1.0]), dtype=np.float64)


def test_a_dimension_with_equal_bounds_is_zero_in_normalised_space() -> None:
    box = spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([4.0, 0.5], np.float32))
    actor = SquashedGaussianActor(VECTOR, box, OPTIONS)
    normalised = actor.normalise(torch.tensor([[4.0, 0.5], [1.0, 0.5], [-2.0, 0.5]]))
    assert normalised.tolist() == [[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]
    assert actor.to_env(normalised).tolist() == [[4.0, 0.5], [1.0, 0.5], [-2.0, 0.5]]


def test_one_discrete_action_keeps_its_axis() -> None:
    assert Critic(VECTOR, SMALL, outputs=1)(torch.zeros(5, 3)).shape == (2, 5, 1)
    assert Critic(VECTOR, SMALL)(torch.zeros(5, 3)).shape == (2, 5)


# A deterministic actor with noise


def test_a_deterministic_actor_explores_by_noise_in_units_of_the_box() -> None:
    actor = DeterministicActor(VECTOR, LOPSIDED, {**OPTIONS, "exploration": 0.25})
    obs = torch.randn(4, 3)
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))
    unit = actor(obs)
    assert unit.shape == (4, 2) and unit.abs().max() < 1.0
    mode, _ = actor.act(obs, deterministic=True)
    torch.testing.assert_close(mode, torch.tensor([1.0, 0.25]) + torch.tensor([3.0, 0.25]) * unit)
    explored, _ = actor.act(obs, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(explored, actor.to_env((unit + 0.25 * noise).clamp(-1, 1)))
    wild = DeterministicActor(VECTOR, LOPSIDED, {**OPTIONS, "exploration": 50.0})
    assert all(LOPSIDED.contains(a) for a in wild.act(torch.randn(40, 3))[0].numpy())


# A Gaussian that is clipped at the edge


def test_a_gaussian_actor_clips_what_the_environment_gets_and_nothing_else() -> None:
    actor = GaussianActor(VECTOR, LOPSIDED, {**OPTIONS, "log_std": 1.5})
    outputs, noise = actor(torch.randn(50, 3)), torch.randn(50, 2)
    mean, log_std = outputs
    assert log_std.shape == (50, 2) and (log_std == 1.5).all()
    sample = actor.sample(outputs, noise)
    torch.testing.assert_close(sample, mean + math.exp(1.5) * noise)
    action = actor.choose(outputs, noise)
    assert torch.equal(action, torch.min(torch.max(sample, actor.low), actor.high))
    assert 0.2 < (action != sample).float().mean() < 0.95
    assert torch.equal(actor.choose(outputs, None), actor.to_env(mean))


def test_a_gaussian_in_units_of_the_box_is_scaled_before_it_is_clipped() -> None:
    actor = GaussianActor(VECTOR, LOPSIDED, {**OPTIONS, "unit_box": True})
    sample = torch.tensor([[0.0, 0.0], [0.5, -0.5], [-1.0, 1.0], [3.0, -3.0]])
    assert actor.to_env(sample).tolist() == [[1.0, 0.25], [2.5, 0.125], [-2.0, 0.5], [4.0, 0.0]]


@pytest.mark.parametrize("unit_box", [False, True])
def test_a_gaussian_acts_in_unbounded_boxes(unit_box: bool) -> None:
    actor = GaussianActor(VECTOR, HALF_OPEN, {**OPTIONS, "unit_box": unit_box})
    action = actor.to_env(torch.tensor([[-1e9, 1e9, 1.0], [7.0, -7.0, -0.5]]))
    assert action[0].tolist() == [-1e9, 1e9, -1.0]
    assert action[1].tolist() == [7.0, 1.0, -2.5 if unit_box else -1.0]
    with pytest.raises(RloptError, match="needs finite bounds"):
        DeterministicActor(VECTOR, HALF_OPEN, OPTIONS)


def test_the_log_standard_deviation_is_learned_and_does_not_depend_on_the_state() -> None:
    actor = Net(build_seeded(lambda: GaussianActor(VECTOR, LOPSIDED, OPTIONS), 0))
    _, log_std = actor(actor.params, torch.randn(6, 3))
    found = torch.autograd.grad(log_std.sum(), actor.leaves, allow_unused=True)
    gradients = dict(zip(actor.params, found, strict=True))
    assert gradients.pop("log_std").tolist() == [6.0, 6.0]
    assert all(g is None for g in gradients.values())


def test_gaussian_densities_are_those_of_torch() -> None:
    mean, log_std, sample = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
    other = Normal(mean, log_std.exp())
    torch.testing.assert_close(gaussian_log_prob(mean, log_std, sample), other.log_prob(sample).sum(-1))
    torch.testing.assert_close(gaussian_entropy(log_std), other.entropy().sum(-1))


def test_a_squashed_density_integrates_to_one_and_is_that_of_the_losses() -> None:
    box = spaces.Box(-3.0, 1.0, (1,), np.float32)
    actor = build_seeded(lambda: SquashedGaussianActor(VECTOR, box, OPTIONS), 3)
    outputs = actor(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    inside = torch.linspace(-1.0, 1.0, 20_001)[1:-1]
    for i in range(2):
        each = tuple(x[i].expand(len(inside), 1) for x in outputs)
        density = actor.log_prob(each, actor.to_env(inside[:, None])).exp()  # in units of [-1, 1]
        assert float(torch.trapezoid(density, inside).detach()) == pytest.approx(1.0, abs=2e-3)
    noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(1))
    action, log_prob = squashed_gaussian(*outputs, noise)
    torch.testing.assert_close(actor.log_prob(outputs, actor.to_env(action)), log_prob, rtol=1e-4, atol=1e-4)
    assert actor.log_prob(outputs, torch.tensor([[-3.0], [1.0]])).isfinite().all()
    with pytest.raises(RloptError, match="no closed form"):
        actor.entropy(outputs)
    with pytest.raises(RloptError, match="a deterministic policy has no density"):
        deterministic = DeterministicActor(VECTOR, box, OPTIONS)
        deterministic.log_prob(deterministic(torch.zeros(1, 3)), torch.zeros(1, 1))


@pytest.mark.parametrize("unit_box", [False, True])
def test_a_gaussian_actors_density_is_that_of_its_samples(unit_box: bool) -> None:
    actor = GaussianActor(VECTOR, LOPSIDED, {**OPTIONS, "log_std": -3.0, "unit_box": unit_box})
    mean, log_std = outputs = actor(torch.zeros(1, 3))
    sample = actor.sample(outputs, (torch.tensor([[0.5, 0.25]]) - mean) * (-log_std).exp())  # inside the Box
    density = actor.log_prob(outputs, actor.to_env(sample))
    torch.testing.assert_close(density, gaussian_log_prob(*outputs, sample), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actor.entropy(outputs), gaussian_entropy(outputs[1]))


def test_discrete_densities_are_those_of_torch() -> None:
    actor = CategoricalActor(VECTOR, spaces.Discrete(4, start=3), OPTIONS)
    logits = actor(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    action = torch.tensor([3, 4, 5, 6, 6])
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(actor.log_prob(logits, action), expected.log_prob(action - 3))
    torch.testing.assert_close(actor.entropy(logits), expected.entropy())
    table = TabularActor(spaces.Discrete(2, start=1), spaces.Discrete(3), {})
    table.probabilities.copy_(torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]]))
    rows = table(torch.tensor([1, 2]))
    assert table.log_prob(rows, torch.tensor([1, 0])).exp().tolist() == pytest.approx([0.8, 1.0])
    assert table.entropy(rows).tolist() == pytest.approx([0.5004, 0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "own"), [("gaussian", {"log_std": -0.5, "unit_box": True}), ("deterministic", {"exploration": 0.3})]
)
def test_the_options_of_a_kind_are_exported(tmp_path: Path, kind: str, own: dict[str, Any]) -> None:
    actor = make_actor(kind, VECTOR, LOPSIDED, {**OPTIONS, **own})
    policy = Policy(EnvSpec("Test-v0", VECTOR, LOPSIDED), actor)
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.actor.options == {**OPTIONS, **own}
    obs = np.random.default_rng(0).normal(size=(20, 3))
    for deterministic in (True, False):
        ours, theirs = (p(obs, None, deterministic, torch.Generator().manual_seed(1)) for p in (policy, loaded))
        assert np.array_equal(ours, theirs) and all(LOPSIDED.contains(a) for a in ours)


def test_kinds_say_where_they_act() -> None:
    for kind, space, words in (
        ("gaussian", spaces.Discrete(2), "a Gaussian policy acts in Box"),
        ("deterministic", spaces.Discrete(2), "acts in Box action spaces"),
        ("categorical", LOPSIDED, "acts in Discrete action spaces"),
    ):
        with pytest.raises(RloptError, match=words):
            make_actor(kind, VECTOR, space, OPTIONS)


def test_bounds_that_float32_cannot_hold_are_refused_in_the_users_numbers() -> None:
    wide = spaces.Box(-1e300, 1e300, (1,), np.float64)
    with pytest.raises(RloptError, match=r"finite bounds on every action, not Box\(-1e\+300, 1e\+300"):
        SquashedGaussianActor(VECTOR, wide, OPTIONS)
    assert GaussianActor(VECTOR, wide, {**OPTIONS, "unit_box": True}).to_env(torch.tensor([[9.0]])).tolist() == [[9.0]]


# No action leaves its Box by rounding

FLOATS = st.floats(-1e4, 1e4, width=32)
TOP = float(np.finfo(np.float32).max)


@settings(max_examples=150, deadline=None)
@given(low=FLOATS, high=FLOATS)
def test_the_ends_of_an_action_lie_inside_its_bounds(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    box = spaces.Box(np.float32(low), np.float32(high), (1,))
    actor = SquashedGaussianActor(VECTOR, box, network_options(NetworkConfig(hidden=())))
    ends = actor.to_env(torch.tensor([[-1.0], [-0.99999994], [0.3], [0.99999994], [1.0]]))
    assert all(box.contains(a) for a in ends.numpy())
    # By no more than a few units in the last place of the larger end.
    unit = float(np.spacing(np.float32(max(abs(low), abs(high)))))
    assert float(ends[0]) - low <= 4 * unit and high - float(ends[-1]) <= 4 * unit


@pytest.mark.parametrize(
    ("low", "high"),
    [(-160.48345947265625, 31.427471160888672), (-TOP, TOP), (2e38, 3e38), (-3e38, -2e38), (0.1, 0.1), (0.0, 1e-45)],
)
@pytest.mark.parametrize("kind", ["squashed_gaussian", "deterministic", "gaussian"])
def test_extreme_bounds(kind: str, low: float, high: float) -> None:
    box = spaces.Box(np.float32(low), np.float32(high), (1,))
    options = {**OPTIONS, "unit_box": True} if kind == "gaussian" else OPTIONS
    actor: Any = make_actor(kind, VECTOR, box, options)
    ends = actor.to_env(torch.tensor([[-1.0], [0.0], [1.0]]))
    assert ends.isfinite().all() and all(box.contains(a) for a in ends.numpy())
    if kind != "gaussian":
        assert actor.normalise(ends).isfinite().all()


HEADS = [
    spaces.MultiDiscrete([3, 2, 5], start=[0, 1, -2]),
    spaces.MultiDiscrete([[2, 2], [2, 2]]),
    spaces.MultiBinary(4),
]
SIZES = dict(zip(map(str, HEADS), [[3, 2, 5], [2] * 4, [2] * 4], strict=True))


@pytest.mark.parametrize("space", HEADS, ids=str)
def test_every_component_of_an_action_has_a_distribution_of_its_own(space: spaces.Space[Any]) -> None:
    actor = MultiCategoricalActor(VECTOR, space, network_options(SMALL))
    generator = torch.Generator().manual_seed(0)
    obs = torch.zeros(4000, 3)
    outputs = actor(obs)
    action, _ = actor.act(obs, generator=generator)
    assert action.dtype == torch.int64
    assert action.shape == (4000, *space.shape)
    assert all(space.contains(row.numpy().astype(space.dtype)) for row in action[:50])
    log_prob, entropy = actor.log_prob(outputs, action), actor.entropy(outputs)
    torch.testing.assert_close(-log_prob.mean(), entropy[0], atol=0.05, rtol=0.0)
    one_by_one = sum(
        torch.distributions.Categorical(logits=head[:, :size]).log_prob(chosen - start)
        for head, size, chosen, start in zip(
            outputs.unbind(1), SIZES[str(space)], action.flatten(1).unbind(1), actor.start.tolist(), strict=True
        )
    )
    torch.testing.assert_close(log_prob, one_by_one)
    best, _ = actor.act(obs[:1], deterministic=True)
    assert torch.equal((best - actor.start.view(best.shape)).flatten(), outputs[0].argmax(-1))
    drawn = actor.uniform(4000, generator)
    spread = (drawn.flatten(1) - actor.start).double().mean(0)
    torch.testing.assert_close(spread, (torch.tensor(SIZES[str(space)]) - 1).double() / 2, atol=0.15, rtol=0.0)


def test_masked_actions_are_never_taken_and_have_no_gradient() -> None:
    seen = spaces.Dict(obs=VECTOR, action_mask=spaces.MultiBinary(5))
    one = CategoricalActor(seen, spaces.Discrete(5, start=10), network_options(SMALL))
    many = MultiCategoricalActor(seen, spaces.MultiDiscrete([3, 2]), network_options(SMALL))
    mask = torch.tensor([[False, True, False, True, False], [True, True, False, False, True]])
    obs = {"obs": torch.randn(2, 3).repeat(500, 1), "action_mask": mask.repeat(500, 1)}
    generator = torch.Generator().manual_seed(1)
    for action in (
        one.act(obs, generator=generator)[0],
        one.uniform(1000, generator, obs),
        one.act(obs, None, True)[0],
    ):
        assert obs["action_mask"].gather(1, action[:, None] - 10).all()
    for action in (many.act(obs, generator=generator)[0], many.uniform(1000, generator, obs)):
        assert obs["action_mask"].gather(1, action + torch.tensor([0, 3])).all()
    log_prob, entropy = many.log_prob(many(obs), action), many.entropy(many(obs))
    assert entropy.isfinite().all()
    (log_prob.sum() + entropy.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in many.parameters())
    with pytest.raises(RloptError, match="action_mask must have an entry for each of the 4 actions"):
        CategoricalActor(seen, spaces.Discrete(4), network_options(SMALL))


def test_the_largest_random_number_takes_no_impossible_action() -> None:
    logits = possible(torch.zeros(1, 4), torch.tensor([[True, True, True, False]]))  # thirds do not sum to 1
    below_one = torch.tensor([1.0 - 2.0**-24])
    assert categorical(logits, below_one).tolist() == [2]
    assert categorical(torch.zeros(1, 3), below_one).tolist() == [2]


def test_other_spaces_and_absurd_components_are_refused() -> None:
    with pytest.raises(RloptError, match="acts in MultiDiscrete and MultiBinary spaces, not in Discrete"):
        MultiCategoricalActor(VECTOR, spaces.Discrete(4), network_options(SMALL))
    with pytest.raises(RloptError, match="too many for one policy"):
        MultiCategoricalActor(VECTOR, spaces.MultiDiscrete([1 << 21, *[1] * 9]), network_options(SMALL))

"""Optimisers against torch's, and the skip mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlopt.nn import RULES, Optimiser, OptimiserConfig
from rlopt.nn.distributions import categorical
from rlopt.nn.optim import stacked_sgd
from rlopt.types import RloptError

YES, NO = torch.tensor(True), torch.tensor(False)


def configured(name: str, **options: Any) -> OptimiserConfig:
    """The options among these that the rule reads."""
    return OptimiserConfig(name=name, **{key: value for key, value in options.items() if key in RULES[name].reads})


def reference(name: str, parameter: Tensor, c: OptimiserConfig, lr: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD([parameter], lr, momentum=c.beta1, weight_decay=c.weight_decay)
    if name == "rmsprop":
        return torch.optim.RMSprop([parameter], lr, alpha=c.beta2, eps=c.epsilon, centered=True)
    cls = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return cls([parameter], lr, betas=(c.beta1, c.beta2), eps=c.epsilon, weight_decay=c.weight_decay)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_twenty_steps_equal_torch(name: str, weight_decay: float, max_grad_norm: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(30, generator=g)
    config = configured(name, beta1=0.8, beta2=0.99, epsilon=1e-6, weight_decay=weight_decay)
    flat, parameter = start.clone(), start.clone().requires_grad_()
    ours = Optimiser(flat, 0.05, config, max_grad_norm)
    theirs = reference(name, parameter, config, 0.05)
    for i in range(20):
        grad = torch.randn(30, generator=g) * (0.05 if i % 2 else 3.0)
        parameter.grad = grad.clone()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
        theirs.step()
        ours.gather([grad[:12].view(3, 4), grad[12:]])
        ours.step(ours.norm(), YES)
        torch.testing.assert_close(flat, parameter.detach(), rtol=1e-5, atol=1e-6)
    assert ours.count.item() == 20


@pytest.mark.parametrize("name", list(RULES))
def test_the_factor_scales_the_learning_rate(name: str) -> None:
    grad, config = torch.randn(5), OptimiserConfig(name=name)
    flats = []
    for rate, factor in ((0.1, 0.3), (0.03, 1.0)):
        flat = torch.zeros(5)
        optimiser = Optimiser(flat, rate, config)
        optimiser.gather([grad])
        optimiser.step(optimiser.norm(), YES, factor)
        flats.append(flat)
    torch.testing.assert_close(*flats)


def test_clipping_by_hand() -> None:
    """(3, 4) has norm 5: clipped to 1 it is (0.6, 0.8); a norm of 10 allowed leaves it alone."""
    for limit, expected in ((1.0, (-0.6, -0.8)), (10.0, (-3.0, -4.0)), (None, (-3.0, -4.0))):
        flat = torch.zeros(2)
        optimiser = Optimiser(flat, 1.0, OptimiserConfig(name="sgd", beta1=0.0), limit)
        optimiser.gather([torch.tensor([3.0]), torch.tensor([[4.0]])])
        assert optimiser.norm().item() == 5.0
        optimiser.step(optimiser.norm(), YES)
        assert flat.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_leaves_parameters_moments_and_count(name: str, bad: float) -> None:
    g = torch.Generator().manual_seed(0)
    config = configured(name, weight_decay=0.1)
    flat = torch.randn(6, generator=g)
    optimiser = Optimiser(flat, 0.1, config, max_grad_norm=1.0)

    def apply(grad: Tensor, ok: Tensor) -> None:
        optimiser.gather([grad])
        optimiser.step(optimiser.norm(), ok)

    apply(torch.randn(6, generator=g), YES)
    before = [flat.clone(), *(v.clone() for v in optimiser.state_dict().values())]
    apply(torch.full((6,), bad), NO)
    after: list[Any] = [flat, *optimiser.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    apply(torch.randn(6, generator=g), YES)
    assert optimiser.count.item() == 2
    assert not torch.equal(flat, before[0]) and flat.isfinite().all()


def test_categorical_inverts_the_distribution_function() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(7, 4)
    uniform = torch.tensor([0.0, 0.05, 0.15, 0.29, 0.31, 0.61, 0.99999])
    assert categorical(logits, uniform).tolist() == [0, 0, 1, 1, 2, 3, 3]
    # A uniform draw of exactly 0 happens (float32 has 2**24 of them): an impossible action must not come of it.
    assert categorical(torch.tensor([[-torch.inf, 0.0]]), torch.zeros(1)).tolist() == [1]
    certain = torch.tensor([[-1e9, 0.0, -1e9]]).expand(3, 3)
    assert categorical(certain, torch.tensor([1e-6, 0.5, 0.999999])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_decay_of_one_is_refused_because_it_divides_by_zero(name: str) -> None:
    with pytest.raises(RloptError, match=rf"agent\.optimiser\.{name}=1 must be below 1"):
        OptimiserConfig(**{name: 1.0})


# --- rules


def stepped(optimiser: Optimiser, *grads: Tensor) -> Tensor:
    for grad in grads:
        optimiser.gather([grad])
        optimiser.step(optimiser.norm(), torch.ones(optimiser.count.shape, dtype=torch.bool))
    return optimiser.flat


def test_rmsprop_by_hand() -> None:
    """Decay ½: after gradients 2 and 0 the mean is ½, the mean square 1, the variance ¾; the first step's is 1."""
    two, zero = torch.tensor([2.0]), torch.tensor([0.0])
    config = {"beta2": 0.5, "epsilon": 0.44}
    outside = Optimiser(torch.zeros(1), 1.0, OptimiserConfig(name="rmsprop", **config))
    assert stepped(outside, two).item() == pytest.approx(-2.0 / (1.0 + 0.44))
    inside = Optimiser(torch.zeros(1), 1.0, OptimiserConfig(name="rmsprop_tf", **config))
    assert stepped(inside, two).item() == pytest.approx(-2.0 / 1.2)
    before = inside.flat.item()
    assert stepped(inside, zero).item() == before
    assert inside.state["first"].item() == 0.5 and inside.state["second"].item() == 1.0


def test_a_variance_below_zero_by_rounding_is_none() -> None:
    """A gradient that never changes has none; torch's own can be NaN here."""
    optimiser = Optimiser(torch.zeros(50), 1e-3, OptimiserConfig(name="rmsprop", beta2=0.95))
    grad = torch.linspace(0.1, 3.3, 50)
    assert stepped(optimiser, *[grad] * 400).isfinite().all()


@pytest.mark.parametrize("name", list(RULES))
def test_stacked_runs_are_single_ones_and_skip_alone(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    start, config = torch.randn(3, 5, generator=g), OptimiserConfig(name=name)
    together = Optimiser(start.clone(), 0.1, config)
    alone = [Optimiser(row.clone(), 0.1, config) for row in start]
    for i in range(5):
        grads, ok = torch.randn(3, 5, generator=g), torch.tensor([True, i != 2, i > 1])
        together.gather([grads])
        together.step(together.norm(), ok)
        for r, one in enumerate(alone):
            one.gather([grads[r]])
            one.step(one.norm(), ok[r])
    for r, one in enumerate(alone):
        assert torch.equal(together.flat[r], one.flat) and together.count[r] == one.count


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "rmsprop_tf"])
def test_steps_on_a_cpu_are_those_of_the_lines_for_devices(name: str) -> None:
    """The compiled loops are for float32 alone: float64 takes the lines that a GPU runs."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, 1001, generator=g)
    config = configured(name, beta1=0.8, beta2=0.9, epsilon=1e-4, weight_decay=0.05)
    own, plain = Optimiser(start.clone(), 0.01, config), Optimiser(start.double(), 0.01, config)
    if name == "sgd":
        plain.rule = lambda parts, _, lr, ok: stacked_sgd(config, parts, lr, ok)
    for i in range(6):
        grads, ok = torch.randn(3, 1001, generator=g), torch.tensor([True, i != 2, i > 1])
        if i == 2:
            grads[1, 500] = torch.nan  # of the run that is skipped
        for optimiser in (own, plain):
            optimiser.gather([grads.to(optimiser.flat.dtype)])
            optimiser.step(optimiser.norm(), ok, torch.tensor(0.5))
    torch.testing.assert_close(own.flat, plain.flat.float(), rtol=1e-5, atol=1e-6)
    for slot, x in own.state.items():
        torch.testing.assert_close(x, plain.state[slot].float(), rtol=1e-5, atol=1e-6)
    assert own.count.tolist() == plain.count.tolist() == [6, 5, 4]


@pytest.mark.parametrize("name", ["rmsprop", "rmsprop_tf"])
def test_a_loss_built_before_a_step_cannot_be_differentiated_after_it(name: str) -> None:
    optimiser = Optimiser(torch.ones(4), 0.1, OptimiserConfig(name=name))
    leaf = optimiser.flat.detach().requires_grad_()
    loss = (leaf**2).sum()
    stepped(optimiser, torch.ones(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", list(RULES))
def test_large_leaves_that_stay_where_they_are_take_the_same_steps(
    name: str, max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(3, 2), (4, 5), (5, 4), (2,), (1, 3), (30,)]
    g = torch.Generator().manual_seed(0)
    start = torch.randn(sum(math.prod(shape) for shape in shapes), generator=g)
    copied, left = (Optimiser(start.clone(), 0.1, OptimiserConfig(name=name), max_grad_norm) for _ in range(2))
    for i in range(4):
        grads = [torch.randn(shape[::-1], generator=g) for shape in shapes]
        grads = [x.mT if x.dim() == 2 else x for x in grads]  # in another order than the leaves
        ok = torch.tensor(i != 2)
        copied.gather(grads)
        monkeypatch.setattr("rlopt.nn.optim.LARGE", 20)
        left.gather(grads)
        monkeypatch.undo()
        assert [len(grad) for _, grad, _ in left.parts] == [6, 20, 20, 5, 30]
        torch.testing.assert_close(left.norm(), copied.norm())
        for optimiser in (copied, left):
            optimiser.step(optimiser.norm(), ok)
        torch.testing.assert_close(left.flat, copied.flat)
        torch.testing.assert_close(left.state, copied.state)
        assert left.count == copied.count


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_gradients_that_autograd_shares_or_strides_are_taken_as_they_are(
    max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two leaves whose gradient is one tensor, and two whose gradients lie between each other."""
    copied, left = (Optimiser(torch.zeros(80), 0.1, OptimiserConfig(), max_grad_norm) for _ in range(2))
    shared = torch.randn(20, generator=torch.Generator().manual_seed(0))
    woven = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    grads = [shared, shared, woven[:, 0], woven[:, 1]]
    before = shared.clone()
    for optimiser, large in ((copied, 100), (left, 20)):
        monkeypatch.setattr("rlopt.nn.optim.LARGE", large)
        optimiser.gather(grads)
        optimiser.step(optimiser.norm(), YES)
    torch.testing.assert_close(left.flat, copied.flat)
    torch.testing.assert_close(left.state, copied.state)
    assert torch.equal(shared, before)


@pytest.mark.parametrize("name", list(RULES))
def test_a_learning_rate_on_the_device_is_the_same_number(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    one, other = (Optimiser(torch.ones(4), 0.1, OptimiserConfig(name=name)) for _ in range(2))
    for _ in range(3):
        grad = torch.randn(4, generator=g)
        for optimiser, factor in ((one, 0.3), (other, torch.tensor(0.3, dtype=torch.float64))):
            optimiser.gather([grad])
            optimiser.step(optimiser.norm(), YES, factor)
    assert torch.equal(one.flat, other.flat)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "adma"}, "agent.optimiser.name: no such choice 'adma'; did you mean adam?"),
        ({"name": "Adagrad"}, "agent.optimiser.name: no such choice 'Adagrad'; did you mean torch:Adagrad?"),
        ({"name": "wonder"}, "or torch:CLASS, or pytorch_optimizer:CLASS"),
        (
            {"name": "sgd", "beta2": 0.5},
            "agent.optimiser.beta2=0.5: sgd does not read it; it reads beta1, weight_decay",
        ),
        ({"name": "rmsprop", "beta1": 0.5}, "agent.optimiser.beta1=0.5: rmsprop does not read it"),
        ({"kwargs": {"cautious": True}}, "agent.optimiser.kwargs={'cautious': True}: adam does not read it"),
        ({"name": "torch:SGD", "beta1": 0.5}, "agent.optimiser.beta1=0.5: torch:SGD does not read it; it reads kwargs"),
    ],
)
def test_what_a_rule_does_not_know_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RloptError) as error:
        OptimiserConfig(**options)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_no_name_runs_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that was made while a rule was there."""
    monkeypatch.setitem(RULES, "mine", RULES["sgd"])
    config = OptimiserConfig(name="mine")
    monkeypatch.delitem(RULES, "mine")
    with pytest.raises(RloptError, match=r"agent\.optimiser\.name=mine: no such rule"):
        Optimiser(torch.zeros(2), 0.1, config)

"""Optimisers against torch's, and the skip mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlopt.nn import Optimiser, OptimiserConfig
from rlopt.nn.distributions import categorical
from rlopt.types import RloptError

YES, NO = torch.tensor(True), torch.tensor(False)


def reference(name: str, parameter: Tensor, c: OptimiserConfig, lr: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD([parameter], lr, momentum=c.beta1, weight_decay=c.weight_decay)
    cls = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return cls([parameter], lr, betas=(c.beta1, c.beta2), eps=c.epsilon, weight_decay=c.weight_decay)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_twenty_steps_equal_torch(name: str, weight_decay: float, max_grad_norm: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(30, generator=g)
    config = OptimiserConfig(name=name, beta1=0.8, beta2=0.99, epsilon=1e-6, weight_decay=weight_decay)
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


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
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


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_leaves_parameters_moments_and_count(name: str, bad: float) -> None:
    g = torch.Generator().manual_seed(0)
    config = OptimiserConfig(name=name, weight_decay=0.1)
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

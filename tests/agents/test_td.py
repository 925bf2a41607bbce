"""Losses of a residual, by hand."""

from __future__ import annotations

import pytest
import torch

from rlopt.agents.td import huber, make_td_loss, pal, squared
from rlopt.training import train_config
from rlopt.training.setup import resolve_config
from tests.agents.cases import AGENTS, LEARNERS

RESIDUAL = torch.tensor([[0.5, -2.0], [1.0, 3.0]], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 0.5], dtype=torch.float64)


def test_squared() -> None:
    # ½ (0.25 + 4)/2 + ½ (1 + 9)/2
    assert squared(RESIDUAL, None).item() == pytest.approx(1.0625 + 2.5)
    # ½ (0.25 + 2)/2 + ½ (1 + 4.5)/2
    assert squared(RESIDUAL, WEIGHT).item() == pytest.approx(0.5625 + 1.375)


def test_huber_is_quadratic_inside_and_linear_outside() -> None:
    # (0.125 + 1·(2 - ½))/2 + (0.5 + 1·(3 - ½))/2
    assert huber(RESIDUAL, None, 1.0).item() == pytest.approx(0.8125 + 1.5)
    residual = RESIDUAL.clone().requires_grad_()
    huber(residual, None, 1.0).backward()
    assert residual.grad.flatten().tolist() == pytest.approx([0.25, -0.5, 0.5, 0.5])  # clip(δ, ±1)/2


def test_pal_by_hand() -> None:
    alpha = 0.5
    # inside ½ δ² = 0.125; at and beyond 1: |δ|^1.5/1.5 = 1.885618, 0.666667, 3.464102
    # scale: mean of max(1, 1)^½ and max(3, 1)^½ = (1 + 1.732051)/2 = 1.366025
    expected = ((0.125 + 1.8856181) / 2 + (0.6666667 + 3.4641016) / 2) / 1.3660254
    assert pal(RESIDUAL, None, 1.0, alpha).item() == pytest.approx(expected, rel=1e-6)


def test_rows_of_weight_0_count_in_no_scale_of_pal() -> None:
    more = torch.cat([RESIDUAL, torch.tensor([[50.0], [-9.0]], dtype=torch.float64)], 1)
    weight = torch.cat([WEIGHT, torch.zeros(1, dtype=torch.float64)])
    assert pal(more, weight, 1.0, 0.5).item() * 3 == pytest.approx(pal(RESIDUAL, WEIGHT, 1.0, 0.5).item() * 2)
    assert pal(more, torch.zeros_like(weight), 1.0, 0.5).item() == 0.0
    ones = torch.ones_like(WEIGHT)
    assert pal(RESIDUAL, ones, 1.0, 0.5).item() == pytest.approx(pal(RESIDUAL, None, 1.0, 0.5).item(), rel=1e-12)


def test_pal_has_the_gradient_that_lap_has_in_expectation() -> None:
    """Uniform PAL = prioritised Huber: Σ_i P(i) clip(δ_i) with P(i) ∝ max(|δ_i|, 1)^α (theorem 2 of the paper)."""
    alpha, rows = 0.4, 50
    delta = 3.0 * torch.randn(1, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    residual = delta.clone().requires_grad_()
    pal(residual, None, 1.0, alpha).backward()
    mass = delta.abs().clamp(min=1.0) ** alpha
    assert torch.allclose(residual.grad, mass / mass.sum() * delta.clamp(-1.0, 1.0))


def test_a_name_makes_a_loss() -> None:
    assert torch.equal(make_td_loss("auto", 1.0, 0.4)(RESIDUAL, None), squared(RESIDUAL, None))
    assert torch.equal(make_td_loss("huber", 0.7, 0.4)(RESIDUAL, WEIGHT), huber(RESIDUAL, WEIGHT, 0.7))
    assert torch.equal(make_td_loss("pal", 0.7, 0.3)(RESIDUAL, WEIGHT), pal(RESIDUAL, WEIGHT, 0.7, 0.3))


@pytest.mark.parametrize(
    ("buffer", "agent", "expected"),
    [
        ({"name": "lap", "floor": 0.3}, {}, ("huber", 0.3)),
        ({"name": "lap"}, {"td_loss": "squared"}, ("squared", 1.0)),
        ({"name": "uniform"}, {}, ("squared", 1.0)),
        ({"name": "uniform"}, {"td_loss": "pal", "td_threshold": 2.0}, ("pal", 2.0)),
    ],
)
def test_lap_brings_its_loss_unless_another_is_asked_for(buffer, agent, expected) -> None:
    config = resolve_config(train_config({"buffer": buffer, "agent": {"name": "sac", **agent}}))
    assert (config.agent.td_loss, config.agent.td_threshold) == expected


@pytest.mark.parametrize("kind", ["huber", "pal"])
@pytest.mark.parametrize("name", [n for n in LEARNERS if AGENTS[n].always.get("values", "scalar") == "scalar"])
def test_every_agent_takes_the_loss(name: str, kind: str, make_agent, make_batch) -> None:
    plain, other = make_agent(name), make_agent(name, td_loss=kind, td_threshold=0.05)
    batch = make_batch(plain, 0)
    assert other.update(batch).metrics["critic_loss"] != plain.update(batch).metrics["critic_loss"]


def test_the_hand_written_gradients_know_huber_and_leave_pal_to_autograd(make_agent, make_batch) -> None:
    fused, plain = (make_agent("sac", fused=f, td_loss="huber", td_threshold=0.3) for f in (True, False))
    for i in range(3):
        a, b = fused.update(make_batch(fused, i)), plain.update(make_batch(plain, i))
        torch.testing.assert_close(a.metrics["critic_loss"], b.metrics["critic_loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.critic.flat, plain.critic.flat, rtol=1e-3, atol=1e-5)
    assert fused.fused is not None
    assert make_agent("sac", td_loss="pal").fused is None

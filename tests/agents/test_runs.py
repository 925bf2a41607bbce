"""Several runs side by side are several single runs: the same numbers, and nothing leaks from one into another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlopt.buffers import Batch
from rlopt.nn import NetworkConfig, Optimiser, OptimiserConfig
from rlopt.nn.optim import stacked_adam
from rlopt.registry import get_agent
from rlopt.types import RloptError, map_obs
from tests.agents.cases import AGENTS, GRADIENT_LEARNERS, LEARNERS

RUNS, FIRST_SEED, SIZE = 3, 5, 8
SIDE_BY_SIDE = [name for name in LEARNERS if get_agent(name).supports_runs]
every_variant = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in SIDE_BY_SIDE for options in AGENTS[name].variants]
)


def build(make_agent, name: str, options: dict[str, Any], seed: int, runs: int = 1):
    options = {"network": NetworkConfig(hidden=(12, 12)), "batch_size": SIZE, **options}
    return make_agent(name, seed=seed, runs=runs, **options)


def join(batches: list[Batch]) -> Batch:
    """The batches of R runs as the replay layer gives them: (R·B, …), run by run."""
    first = batches[0]
    fields = {}
    for field in Batch._fields:
        values = [getattr(b, field) for b in batches]
        if isinstance(getattr(first, field), torch.Tensor):
            fields[field] = torch.cat(values)
        elif isinstance(getattr(first, field), dict):
            fields[field] = {key: torch.cat([value[key] for value in values]) for key in values[0]}
        else:
            fields[field] = None
    return Batch(**fields)


def nets_of(agent) -> list[str]:
    return [n for n in ("actor", "critic", "target", "value") if hasattr(agent, n)]


@every_variant
def test_each_run_equals_a_single_run_on_its_data_and_noise(name: str, options, make_agent, make_batch) -> None:
    together = build(make_agent, name, options, FIRST_SEED, RUNS)
    alone = [build(make_agent, name, options, FIRST_SEED + r) for r in range(RUNS)]
    for r, agent in enumerate(alone):
        for net in nets_of(agent):
            assert torch.equal(getattr(together, net).flat[r], getattr(agent, net).flat)
    for k in range(5):
        batches = [make_batch(agent, 10 * k + r, size=SIZE) for r, agent in enumerate(alone)]
        singles = [agent.update(batch) for agent, batch in zip(alone, batches, strict=True)]
        update = together.update(join(batches))
        assert update.priority.shape == (RUNS * SIZE,)
        torch.testing.assert_close(update.priority, torch.cat([s.priority for s in singles]), rtol=1e-3, atol=1e-4)
        for key, value in update.metrics.items():
            assert value.shape == (RUNS,)
            torch.testing.assert_close(value, torch.stack([s.metrics[key] for s in singles]), rtol=1e-3, atol=1e-4)
    for r, agent in enumerate(alone):
        for net in nets_of(agent):
            torch.testing.assert_close(getattr(together, net).flat[r], getattr(agent, net).flat, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
@pytest.mark.parametrize("steps", [0, 1_000_000])
def test_runs_act_as_they_would_alone(name: str, steps: int, make_agent, make_batch) -> None:
    together = build(make_agent, name, {}, FIRST_SEED, RUNS)
    alone = [build(make_agent, name, {}, FIRST_SEED + r) for r in range(RUNS)]
    for agent in (together, *alone):
        agent.clock.env_steps = steps  # inside and after the warm-up
    obs = [make_batch(agent, r, size=2).obs for r, agent in enumerate(alone)]
    for deterministic in (False, True):
        actions = together.act(torch.cat(obs), deterministic=deterministic).action
        expected = [a.act(o, deterministic=deterministic).action for a, o in zip(alone, obs, strict=True)]
        torch.testing.assert_close(actions, torch.cat(expected))
    for r, policy in enumerate(together.policies):
        assert torch.equal(policy.act(obs[r]).action, alone[r].policy.act(obs[r]).action)


@every_variant
def test_a_run_that_meets_nan_is_skipped_alone(name: str, options, make_agent, make_batch) -> None:
    together = build(make_agent, name, options, FIRST_SEED, RUNS)
    before = {net: getattr(together, net).flat.clone() for net in nets_of(together)}
    batches = [make_batch(together, r, size=SIZE) for r in range(RUNS)]
    batches[1] = batches[1]._replace(reward=batches[1].reward.clone().fill_(float("nan")))
    together.update(join(batches))
    for net in ("actor", "critic"):
        after = getattr(together, net).flat
        assert after.isfinite().all()
        moved = [not torch.equal(after[r], before[net][r]) for r in range(RUNS)]
        assert moved == [True, False, True], net
    assert together.guard.first_bad() == "reward"
    assert together.critic_optimiser.count.tolist() == [1.0, 0.0, 1.0]


@every_variant
def test_a_stack_of_runs_is_saved_and_restored(name: str, options, make_agent, make_batch) -> None:
    one = build(make_agent, name, options, FIRST_SEED, RUNS)
    batches = [join([make_batch(one, 10 * k + r, size=SIZE) for r in range(RUNS)]) for k in range(3)]
    one.update(batches[0])
    other = build(make_agent, name, options, 99, RUNS)
    other.load_state_dict(one.state_dict())
    for batch in batches[1:]:
        one.update(batch)
        other.update(batch)
    for net in nets_of(one):
        assert torch.equal(getattr(one, net).flat, getattr(other, net).flat)
    first = batches[0].obs if batches[0].mask is None else map_obs(lambda x: x[:, 0], batches[0].obs)
    obs, carry = map_obs(lambda x: x[: 2 * RUNS], first), one.initial_carry(2 * RUNS)
    one.clock.env_steps = other.clock.env_steps = 1_000_000
    assert torch.equal(one.act(obs, carry).action, other.act(obs, carry).action)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_prioritised_draws_reach_their_run(fused: bool, make_agent, make_batch) -> None:
    options = {"fused": fused}
    together = build(make_agent, "sac", options, FIRST_SEED, 2)
    alone = [build(make_agent, "sac", options, FIRST_SEED + r) for r in range(2)]
    batches = [
        make_batch(a, r, size=SIZE)._replace(weight=torch.linspace(0.1 + r, 1.0, SIZE)) for r, a in enumerate(alone)
    ]
    losses = [a.update(b).metrics["critic_loss"] for a, b in zip(alone, batches, strict=True)]
    torch.testing.assert_close(together.update(join(batches)).metrics["critic_loss"], torch.stack(losses))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_stacked_adam_is_the_fused_one_of_each_run(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = OptimiserConfig(name=name, weight_decay=0.1)
    start = torch.randn(3, 7, generator=generator)
    fused, stacked = (Optimiser(start.clone(), 1e-2, config) for _ in range(2))
    for k in range(6):
        ok = torch.tensor([True, k != 2, k > 1])
        for optimiser in (fused, stacked):
            optimiser.grad.copy_(torch.randn(3, 7, generator=torch.Generator().manual_seed(k)))
        fused.step(fused.norm(), ok)
        stacked.count.add_(ok.float())
        stacked_adam(config, stacked.parts[0], stacked.count, 1e-2, ok)
    assert fused.count.tolist() == stacked.count.tolist() == [6.0, 5.0, 4.0]
    torch.testing.assert_close(stacked.flat, fused.flat)
    torch.testing.assert_close(stacked.state, fused.state)


@pytest.mark.parametrize("name", [name for name in GRADIENT_LEARNERS if name not in SIDE_BY_SIDE])
def test_an_agent_without_a_run_axis_says_so(name: str, make_agent) -> None:
    with pytest.raises(RloptError, match=f"num_runs=2: agent={name} trains one run at a time; leave num_runs out"):
        make_agent(name, runs=2)

"""Samplers of several runs over one ring: each draws as it would alone, and from its own environments only."""

from __future__ import annotations

import pytest
import torch

from rlopt.buffers import (
    PrioritizedReshuffledSampler,
    PrioritizedSampler,
    ReshuffledSampler,
    UniformSampler,
)
from rlopt.buffers.samplers.per_run import RunSamplers

RUNS, EACH, ROWS, SEED, BATCH = 3, 2, 8, 11, 4
KINDS = [UniformSampler, ReshuffledSampler, PrioritizedSampler, PrioritizedReshuffledSampler]
every_kind = pytest.mark.parametrize("kind", KINDS)


def together_and_alone(kind):
    runs = RunSamplers([kind() for _ in range(RUNS)], RUNS * EACH)
    runs.bind(ROWS * RUNS * EACH, torch.device("cpu"), SEED)
    alone = [kind() for _ in range(RUNS)]
    for r, sampler in enumerate(alone):
        sampler.bind(ROWS * EACH, torch.device("cpu"), SEED + r)
    return runs, alone


def priorities(step: int, r: int) -> torch.Tensor:
    return torch.rand(BATCH, generator=torch.Generator().manual_seed(100 * step + r)) + 0.1


@every_kind
def test_a_run_draws_what_its_sampler_would_draw_alone(kind) -> None:
    runs, alone = together_and_alone(kind)
    for step in range(3 * ROWS):  # while the ring fills, and after it has wrapped
        row = step % ROWS
        runs.wrote(row * RUNS * EACH, RUNS * EACH, None)
        for sampler in alone:
            sampler.wrote(row * EACH, EACH, None)
        rows = min(step + 1, ROWS)
        if step < 2:
            continue
        index, weight = runs.sample(RUNS * BATCH, rows * RUNS * EACH)
        for r, sampler in enumerate(alone):
            own, own_weight = sampler.sample(BATCH, rows * EACH)
            mine = index.view(RUNS, BATCH)[r]
            # Slot = row · R·N + r·N + environment.
            assert mine.tolist() == [(i // EACH) * RUNS * EACH + r * EACH + i % EACH for i in own.tolist()]
            if own_weight is None:
                assert weight is None
            else:
                assert torch.equal(weight.view(RUNS, BATCH)[r], own_weight)
            sampler.update_priority(own, priorities(step, r))
        runs.update_priority(index, torch.cat([priorities(step, r) for r in range(RUNS)]))


@every_kind
def test_rows_that_are_no_transition_are_never_drawn(kind) -> None:
    runs, _ = together_and_alone(kind)
    valid = torch.ones(ROWS, RUNS, EACH, dtype=torch.bool)
    valid[2, 1, 0] = valid[3, 1, :] = valid[5, 2, 1] = False
    for row in range(ROWS):
        runs.wrote(row * RUNS * EACH, RUNS * EACH, valid[row].flatten())
    seen = torch.cat([runs.sample(RUNS * BATCH, ROWS * RUNS * EACH)[0] for _ in range(60)])
    assert valid.flatten()[seen].all()
    assert set(seen.tolist()) == set(valid.flatten().nonzero().flatten().tolist())


@every_kind
def test_state_goes_on_where_it_stood(kind) -> None:
    (one, _), (other, _) = together_and_alone(kind), together_and_alone(kind)
    valid = torch.tensor([True, True, False, True, True, True])
    for sampler in (one, other):
        for row in range(ROWS):
            sampler.wrote(row * RUNS * EACH, RUNS * EACH, valid if row == 1 else None)
    one.sample(RUNS * BATCH, ROWS * RUNS * EACH)
    other.load_state_dict(one.state_dict())
    for _ in range(4):
        ours, theirs = (s.sample(RUNS * BATCH, ROWS * RUNS * EACH) for s in (one, other))
        assert torch.equal(ours[0], theirs[0])


def test_environments_must_be_shareable() -> None:
    with pytest.raises(ValueError, match="5 environments cannot be shared by 2 runs"):
        RunSamplers([UniformSampler(), UniformSampler()], 5)


class Weighted(UniformSampler):
    """Its weights are the slots themselves."""

    def sample(self, batch_size, size):
        index, _ = super().sample(batch_size, size)
        return index, index.float()


def test_what_is_drawn_again_brings_its_weight() -> None:
    runs, _ = together_and_alone(Weighted)
    valid = torch.arange(ROWS * RUNS * EACH).view(ROWS, RUNS, EACH) % 3 != 0
    for row in range(ROWS):
        runs.wrote(row * RUNS * EACH, RUNS * EACH, valid[row].flatten())
    index, weight = runs.sample(RUNS * 50, ROWS * RUNS * EACH)
    local = (index // (RUNS * EACH)) * EACH + index % EACH
    assert torch.equal(weight, local.float())

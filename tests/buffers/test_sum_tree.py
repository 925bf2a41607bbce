"""Masses in a tree and in rows: found, changed, saved, and summed without drift."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from rlopt.buffers.samplers.sum_tree import Masses, ScanMasses, SumTree, TreeMasses
from rlopt.state import states_equal

CPU = torch.device("cpu")


class Tree:
    """``SumTree`` and the masses of ``ScanMasses`` behind one face, for tests of what they share."""

    def __init__(self, masses: TreeMasses | ScanMasses) -> None:
        self.masses = masses

    def put(self, index: Any, mass: Any) -> None:
        if isinstance(self.masses, TreeMasses):
            self.masses.tree.put(index, mass)
        else:
            self.masses.leaves[torch.from_numpy(index)] = torch.from_numpy(mass)

    def find(self, fraction: Any) -> Any:
        if isinstance(self.masses, TreeMasses):
            return self.masses.tree.search(fraction)
        return self.masses.find(torch.from_numpy(fraction)).numpy()

    def mass(self) -> Any:
        leaves = self.masses.tree.leaves if isinstance(self.masses, TreeMasses) else self.masses.leaves.numpy()
        return leaves.copy()


def implementations(slots: int) -> list[Masses]:
    return [TreeMasses(slots), ScanMasses(slots, CPU)]


@pytest.mark.parametrize("slots", [1, 7, 8, 9, 64, 65, 1000, 5000])
def test_fractions_find_their_slots(slots: int) -> None:
    """Whole-number masses add without rounding, so every implementation must agree with a cumulative sum."""
    rng = np.random.default_rng(slots)
    mass = np.zeros(slots)
    trees = [Tree(masses) for masses in implementations(slots)]
    for round in range(4):
        index = rng.permutation(slots)[: slots // (round + 1) + 1]
        mass[index] = rng.integers(0, 5, len(index)) * (rng.random(len(index)) < 0.7)
        mass[index[0]] = 3
        total = mass.sum()
        targets = np.concatenate((rng.integers(0, int(total), 50), [0, total - 1, total - 1 + 0.999]))
        expected = np.searchsorted(np.cumsum(mass), targets, side="right")
        for tree in trees:
            tree.put(index, mass[index])
            assert tree.find((targets + 1e-4) / total).tolist() == expected.tolist()
            assert tree.mass().tolist() == mass.tolist()


def test_a_slot_without_mass_is_never_found_whatever_the_rounding() -> None:
    """Masses over 30 orders of magnitude, and the largest fraction below one, which rounds up to the total."""
    rng = np.random.default_rng(0)
    for tree in map(Tree, implementations(300)):
        for _ in range(200):
            mass = 10.0 ** rng.uniform(-20, 10, 300) * (rng.random(300) < 0.3)
            mass[rng.integers(300)] = 1e-20
            tree.put(np.arange(300), mass)
            found = tree.find(np.concatenate((rng.random(50), [0.0, 0.5, 1 - 2**-53])))
            assert (mass[found] > 0).all()


def test_every_table_keeps_and_restores_its_masses() -> None:
    """Entering, changing (not finite: the largest seen; without mass: none), one count of several, saving."""
    for slots in (3, 40):
        for masses, fresh in zip(implementations(slots), implementations(slots), strict=True):
            masses.enter(0, 3, torch.tensor([True, False, True]))
            masses.change(torch.tensor([0, 1, 0]), torch.tensor([4.0, 9.0, 4.0], dtype=torch.float64))
            masses.change(torch.tensor([2]), torch.tensor([float("nan")], dtype=torch.float64))
            assert masses.state_dict(3)["mass"].tolist() == [4, 0, 9]
            masses.enter(1, 1, None)
            index, rare = masses.draw(60, torch.Generator().manual_seed(0), True, True)
            assert rare.tolist() == pytest.approx([{0: 1, 1: 4 / 9, 2: 4 / 9}[i] for i in index.tolist()])
            fresh.enter(0, slots, None)
            fresh.load_state_dict(masses.state_dict(3))
            assert states_equal(fresh.state_dict(slots), masses.state_dict(slots)) is None


@pytest.mark.parametrize("slots", [1, 8, 9, 700])
def test_every_sum_is_that_of_its_terms_in_pairs(slots: int) -> None:
    """Bit for bit, after few and many changes with repeats, and after a restart: no sum depends on the way there."""
    rng = np.random.default_rng(1)
    tree, fresh = SumTree(slots), SumTree(slots)
    for changes in (1, 40, 5000):
        tree.put(rng.integers(0, slots, changes), 10.0 ** rng.uniform(-8, 4, changes))
        for below, above in itertools.pairwise(tree.offsets):
            sums = tree.nodes[below:above].reshape(-1, 8)
            while sums.shape[1] > 1:
                sums = sums[:, ::2] + sums[:, 1::2]
            assert np.array_equal(tree.nodes[above : above + len(sums)], sums[:, 0])
        fresh.put(np.arange(slots), np.full(slots, 7.0))
        fresh.fill(tree.leaves[: slots // 2 + 1])
        tree.put(np.arange(slots // 2 + 1, slots), np.zeros(slots - slots // 2 - 1))
        assert np.array_equal(tree.nodes, fresh.nodes)


def test_sums_do_not_drift() -> None:
    """A huge mass that comes and goes leaves nothing behind."""
    tree = SumTree(100)
    tree.put(np.arange(100), np.full(100, 1e-3))
    before = tree.nodes.copy()
    for _ in range(10):
        tree.put(np.array([37]), np.array([1e15]))
        tree.put(np.array([37]), np.array([1e-3]))
    assert np.array_equal(tree.nodes, before)

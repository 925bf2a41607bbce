"""Single flipped bits of a policy folder: the policy is as it was, or refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from rlopt.policy import Policy, load_policy, save_policy
from tests.faults.outcomes import Outcome, judged
from tests.test_policy_files import policy

JSON = ("policy.json", "state.json")
WEIGHTS = "tensors.safetensors"


def run_json(share: float, chance: random.Random, folder: Path) -> Iterator[Outcome]:
    """Every bit of the JSON files (or a share of them, in even steps)."""
    sound = _saved(folder)
    step = round(1 / share)
    for name in JSON:
        bits = 8 * (sound / name).stat().st_size
        yield from _flipped(sound, name, range(chance.randrange(step), bits, step))


def run_weights(count: int, chance: random.Random, folder: Path) -> Iterator[Outcome]:
    """``count`` random bits of the weights."""
    sound = _saved(folder)
    bits = 8 * (sound / WEIGHTS).stat().st_size
    yield from _flipped(sound, WEIGHTS, [chance.randrange(bits) for _ in range(count)])


def _saved(folder: Path) -> Path:
    meta = {"env": {"id": "Test-v0", "kwargs": {"g": 9.5}}, "seed": 3, "step": 100, "note": "ä"}
    save_policy(policy(), folder / "policy", meta)
    return folder / "policy"


def _flipped(folder: Path, name: str, bits: range | list[int]) -> Iterator[Outcome]:
    path, wanted = folder / name, _seen(load_policy(folder))
    sound = path.read_bytes()
    for bit in bits:
        changed = bytearray(sound)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield judged(f"{name}, bit {bit}", lambda: _seen(load_policy(folder)), wanted)
    path.write_bytes(sound)


def _seen(found: Policy) -> tuple[object, ...]:
    """All that a user sees of a policy."""
    observations = torch.linspace(-3, 3, 30).reshape(10, 3)
    return found(observations).tolist(), found.spec, repr(found.meta)

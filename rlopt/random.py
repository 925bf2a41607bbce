"""Random streams: one generator per consumer, derived by name from the run's seed.

Nothing in rlopt draws from a global generator, so adding a consumer never shifts another's numbers, and evaluating more
often changes nothing in training. Names in use: ``init``, ``act``, ``update``, ``sampler``, ``env/<slot>``,
``evaluation/<episode>``, ``evaluation/noise``, ``order/<update>``, ``group``, ``adversary``, ``episode``, ``grid``, and
those of the robust models' generators.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from rlopt.types import State


def derive_seed(seed: int, *name: str | int) -> int:
    """Return a seed in [0, 2**31) that depends on the run's seed and the consumer's name alone (BLAKE2b)."""
    text = "/".join(str(part) for part in (int(seed), *name))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 2**31


def torch_generator(seed: int, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator on ``device`` for the consumer called ``name``."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *name))


def numpy_generator(seed: int, *name: str | int) -> np.random.Generator:
    """Return a NumPy PCG64 generator for the consumer called ``name``."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *name)))


def generator_state(generator: torch.Generator) -> Tensor:
    """Return the state of a torch generator as a uint8 tensor."""
    return generator.get_state()


def set_generator_state(generator: torch.Generator, state: Tensor) -> None:
    """Put a torch generator where ``generator_state`` found it.

    A state from another kind of device cannot be continued; it then seeds the generator, and the run goes on
    reproducibly but not bit for bit.
    """
    state = state.to(device="cpu", dtype=torch.uint8)
    if state.numel() == generator.get_state().numel():
        generator.set_state(state)
    else:
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") % 2**63)


def numpy_state(generator: np.random.Generator) -> State:
    """Return the state of a PCG64 generator as a state tree (its 128-bit integers as strings)."""
    s = generator.bit_generator.state
    return {
        "bit_generator": s["bit_generator"],
        "state": str(s["state"]["state"]),
        "inc": str(s["state"]["inc"]),
        "has_uint32": int(s["has_uint32"]),
        "uinteger": int(s["uinteger"]),
    }


def set_numpy_state(generator: np.random.Generator, state: State) -> None:
    """Put a PCG64 generator where ``numpy_state`` found it."""
    if state["bit_generator"] != "PCG64":
        raise ValueError(f"only PCG64 generators are restored, not {state['bit_generator']}")
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(state["state"]), "inc": int(state["inc"])},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }

"""Random streams: named, independent, and restorable, on the same kind of device and on another."""

import torch

from rlopt.random import derive_seed, generator_state, set_generator_state, torch_generator


def test_streams_depend_on_seed_and_name_alone():
    assert derive_seed(3, "env", 0) == derive_seed(3, "env", 0)
    assert len({derive_seed(s, n, i) for s in (0, 1) for n in ("env", "act") for i in (0, 1)}) == 8


def test_a_generator_continues_where_it_stood():
    a, b = torch_generator(1, "act"), torch_generator(2, "act")
    torch.rand(7, generator=a)
    set_generator_state(b, generator_state(a))
    assert torch.equal(torch.rand(5, generator=a), torch.rand(5, generator=b))


def test_a_state_of_another_kind_of_device_seeds_the_generator():
    """A CUDA generator's state has 16 bytes, a CPU generator's thousands."""
    a, b = torch_generator(1, "act"), torch_generator(2, "act")
    for generator in (a, b):
        set_generator_state(generator, torch.arange(16, dtype=torch.uint8))
    assert torch.equal(torch.rand(5, generator=a), torch.rand(5, generator=b))

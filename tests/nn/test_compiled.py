"""What compiled code stands on: products, memory by address, tasks taken once, a cache that knows its sources."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlopt import jit
from rlopt.fast import products as c

needs_products = pytest.mark.skipif(not c.products_available(), reason="this build of torch lacks the interface")


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_torch_and_keep_their_operands(dtype: torch.dtype) -> None:
    products = c.Products()
    left, right, out = torch.randn(5, 9, dtype=dtype), torch.randn(3, 9, dtype=dtype), torch.empty(5, 3, dtype=dtype)
    numbers = [products.add(t) for t in (out, left[:, 2:], right[:, 2:].t())]
    expected = left[:, 2:] @ right[:, 2:].t()
    del left, right
    gc.collect()
    c.product(products.state, *numbers)
    products.check()
    assert torch.equal(out, expected)


@needs_products
def test_a_product_that_torch_refuses_is_an_error() -> None:
    products = c.Products()
    out, left, right = (products.add(torch.zeros(*shape)) for shape in ((2, 2), (2, 3), (4, 2)))
    c.product(products.state, out, left, right)
    with pytest.raises(RuntimeError, match="refused"):
        products.check()
    products.check()


def test_memory_by_address_is_the_same_memory() -> None:
    x = torch.arange(12.0)
    assert np.shares_memory(c.floats(x.data_ptr(), 12), x.numpy())
    c.matrix(x.data_ptr(), 3, 4)[1, 2] = 50.0
    assert x[6] == 50.0
    low = torch.ones(2, 3, dtype=torch.bfloat16)
    assert (c.low_matrix(low.data_ptr(), 2, 3) == c.array(low)).all()


@c.compiled
def _share(progress: c.Array, round_: int, done: c.Array) -> None:
    for phase in range(3):
        task = c.claim(progress, phase, round_, 4)
        while task >= 0:
            # The first task of a phase sees all of the phase before.
            if phase > 0 and done[phase - 1].sum() != 4 * (round_ + 1):
                done[3, 0] += 1
            done[phase, task] += 1
            c.finish(progress, phase)
            task = c.claim(progress, phase, round_, 4)
        c.wait(progress, phase, round_, 4)


def test_every_task_of_a_round_is_done_once_and_phases_follow_each_other() -> None:
    progress, done, rounds = c.counters(3), np.zeros((4, 4), np.int64), 3000

    def lane() -> None:
        for i in range(rounds):
            _share(progress, i, done)

    threads = [threading.Thread(target=lane) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (done[:3] == rounds).all() and (done[3] == 0).all()
    assert c.rounds(progress, 2, 4) == rounds


def test_a_thread_that_comes_late_finds_nothing_left() -> None:
    progress, done = c.counters(3), np.zeros((4, 4), np.int64)
    for i in range(3):
        _share(progress, i, done)
    _share(progress, 0, done)
    assert (done[:3] == 3).all()


def test_a_function_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.numba.config, "CACHE_DIR", str(tmp_path))

    def double(x: float) -> float:
        return 2.0 * x

    fresh = c.compiled(double)
    assert jit.compiles(fresh)
    assert fresh(3.0) == 6.0
    assert not jit.compiles(fresh)


def test_a_cache_of_code_whose_classes_were_renamed_is_none() -> None:
    def load() -> None:
        raise AttributeError("Can't get attribute 'Rows'")

    assert jit._index(load) == {} and jit._index(lambda: {1: 2}) == {1: 2}


def test_the_cache_of_machine_code_knows_every_source_that_went_into_it(tmp_path, monkeypatch) -> None:
    assert c.claim._cache._cache_file._source_stamp == jit._stamp(Path(c.__file__))  # numba's own is of one file
    package = tmp_path / "rlopt"
    (package / "nn").mkdir(parents=True)
    texts = {
        "jit.py": "", "agents.py": "from rlopt.nn.mlp import forward", "nn/mlp.py": "import rlopt.nn.constants as k",
        "nn/constants.py": "LOW = -20.0", "nn/other.py": "A = 1",
    }  # fmt: skip
    for name, text in texts.items():
        (package / name).write_text(text)
    monkeypatch.setattr(jit, "__file__", str(package / "jit.py"))

    def stamp() -> str:
        return jit._stamp.__wrapped__(package / "agents.py")

    first = stamp()
    (package / "nn" / "other.py").write_text("A = 2")
    assert stamp() == first
    (package / "nn" / "constants.py").write_text("LOW = -5.0")  # two imports away
    second = stamp()
    (package / "jit.py").write_text("# new")
    assert len({first, second, stamp()}) == 3


COMPILES = """
import sys
sys.path.insert(0, sys.argv[1])
from slow import double
sys.stdin.readline()  # both at once
double(3.0)
print(sum(double.stats.cache_misses.values()))
"""


def test_of_processes_that_need_the_same_machine_code_one_compiles_it(tmp_path: Path) -> None:
    source = "from rlopt.jit import jit\n\n\ndef double(x):\n    return 2.0 * x\n\n\ndouble = jit(double)\n"
    (tmp_path / "slow.py").write_text(source)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(c.__file__).parents[2])}
    command = [sys.executable, "-c", COMPILES, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        print(file=process.stdin, flush=True)
    misses = [int(process.communicate(timeout=60)[0]) for process in both]
    assert sorted(misses) == [0, 1]

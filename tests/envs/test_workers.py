"""Worker processes that die, stall or fail."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlopt.envs import AsyncVectorEnv, make_env
from rlopt.envs.counting import CountEnv
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.types import RloptError

ROOT = Path(__file__).resolve().parents[2]
QUIET = torch.zeros(3, 1)
SECOND = torch.tensor([[0.0], [1.0], [0.0]])


@pytest.fixture
def make() -> Iterator[Callable[..., AsyncVectorEnv]]:
    made: list[AsyncVectorEnv] = []

    def build(timeout: float = 60.0, **kwargs: Any) -> AsyncVectorEnv:
        fns = [EnvFactory(find_spec("rlopt/Count-v0"), kwargs)] * 3
        made.append(AsyncVectorEnv(fns, seed=5, timeout=timeout))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.mark.parametrize(("trouble", "timeout"), [("exit", 60.0), ("stall", 1.0)])
def test_a_lost_workers_slot_is_replaced_alone(make: Any, trouble: str, timeout: float) -> None:
    env = make(timeout, length=4, trouble=trouble)
    env.reset()
    env.step(QUIET)
    step = env.step(SECOND)
    assert env.restarts == 1
    assert step.valid.tolist() == [True, False, True]
    assert step.ended.tolist() == [False, True, False]
    assert step.reward.tolist() == [2.0, 0.0, 2.0]
    assert step.obs.tolist() == step.next_obs.tolist() == [[2.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
    assert not step.terminated.any()
    assert not step.truncated.any()
    after = env.step(QUIET)
    assert after.valid.all()
    assert after.next_obs.tolist() == [[3.0, 0.0], [1.0, 0.0], [3.0, 0.0]]
    assert after.reward.tolist() == [3.0, 1.0, 3.0]


def test_a_worker_killed_from_outside_is_replaced_at_the_next_step_or_reset(make: Any) -> None:
    env = make(length=4)
    env.reset()
    os.kill(env._workers[0].process.pid, signal.SIGKILL)
    env._workers[0].process.join()
    assert env.state_dict() is None
    step = env.step(QUIET)
    assert step.valid.tolist() == [False, True, True]
    os.kill(env._workers[2].process.pid, signal.SIGKILL)
    assert env.reset()[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert env.restarts == 2
    assert env.step(QUIET).valid.all()


def test_a_slot_that_is_lost_again_and_again_ends_the_run(make: Any) -> None:
    env = make(length=4, trouble="exit")
    env.reset()
    for k in range(3):
        assert env.step(SECOND).valid.tolist() == [True, False, True]
        assert env.restarts == k + 1
    with pytest.raises(RloptError, match="environment 1 was lost 4 times in a row"):
        env.step(SECOND)


def test_an_error_inside_an_environment_is_told_in_one_line(make: Any) -> None:
    env = make(trouble="raise")
    env.reset()
    with pytest.raises(RloptError) as caught:
        env.step(SECOND)
    assert str(caught.value) == "environment 1 failed: ValueError: the counting environment was told to fail"
    assert "_make_trouble" in caught.value.__notes__[0]  # where it happened, for whoever looks at the traceback
    assert env.restarts == 0
    with pytest.raises(RloptError, match="is closed"):
        env.step(QUIET)


def test_what_cannot_be_built_or_sent_is_told() -> None:
    with pytest.raises(RloptError, match="wrong_name"):
        make_env("rlopt/Count-v0", 2, backend="async", kwargs={"wrong_name": 1})
    with pytest.raises(RloptError, match="cannot be sent to a worker"):
        AsyncVectorEnv([lambda: CountEnv(length=2)])


def test_slots_draw_from_their_own_streams_as_in_the_sync_backend() -> None:
    actions = torch.full((2, 1), 0.3)
    both = [make_env("Pendulum-v1", 2, seed=7, backend=b, kwargs={"max_episode_steps": 3}) for b in ("sync", "async")]
    firsts = [env.reset() for env in both]
    assert torch.equal(*firsts)
    assert not torch.equal(firsts[0][0], firsts[0][1])
    for _ in range(7):
        a, b = (env.step(actions) for env in both)
        assert torch.equal(a.obs, b.obs)
        assert torch.equal(a.next_obs, b.next_obs)
        assert torch.equal(a.ended, b.ended)
        assert torch.equal(a.reward, b.reward)
    for env in both:
        env.close()


def test_a_worker_lost_in_a_seeded_reset_begins_with_the_seed_that_was_asked_for() -> None:
    """Episodes of a group share a first state, and those of an evaluation are named by their seeds."""
    env, other = (make_env("Pendulum-v1", 2, seed=5, backend=b, autoreset=False) for b in ("async", "sync"))
    try:
        assert isinstance(env, AsyncVectorEnv)
        env.reset()
        worker = env._workers[1]
        assert worker is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join()
        assert torch.equal(env.reset(seeds=[11, 12]), other.reset(seeds=[11, 12]))
        assert env.restarts == 1
    finally:
        env.close()
        other.close()


@pytest.mark.parametrize(("last", "code"), [("", 0), ("raise ValueError('a bug')", 1)])
def test_a_script_ends_although_it_closes_nothing(last: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from rlopt.envs import make_env\n"
        "if __name__ == '__main__':\n"
        "    env = make_env('Pendulum-v1', 2, backend='async')\n"
        "    env.reset()\n"
        "    print(*(worker.process.pid for worker in env._workers), flush=True)\n"
        f"    {last}\n"
    )
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("a bug" in done.stderr) == bool(code)
    for pid in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_an_environment_that_is_dropped_ends_its_workers() -> None:
    env = make_env("Pendulum-v1", 1, backend="async")
    assert isinstance(env, AsyncVectorEnv) and env._workers[0] is not None
    process = env._workers[0].process
    del env
    gc.collect()
    assert not process.is_alive()

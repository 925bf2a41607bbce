"""Worker processes that die, stall or fail."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
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


LATE = """
import gymnasium, itertools, os, pathlib, signal, time
from rlopt.envs.counting import CountEnv

class Late(CountEnv):
    def __init__(self, folder, deaths=0, **kwargs):
        super().__init__(**kwargs)
        starts = pathlib.Path(folder)
        for k in itertools.count():
            try:
                (starts / f"start{k}").touch(exist_ok=False)
                break
            except FileExistsError:
                pass
        if k < deaths:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, action):
        while action[0] > 0.5:  # without an end
            pass
        return super().step(action)

gymnasium.register("Late-v0", entry_point=Late)
"""


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The id of an environment whose first workers die while they start."""
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "starts").mkdir()
    yield "late:Late-v0"
    sys.modules.pop("late", None)


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_worker_that_dies_while_it_starts_is_started_again(
    tmp_path: Path, late: str, deaths: int, caplog: pytest.LogCaptureFixture
) -> None:
    kwargs = {"folder": str(tmp_path / "starts"), "deaths": deaths}
    env = make_env(late, 2, backend="async", kwargs=kwargs)
    try:
        assert env.reset().tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert env.step(torch.zeros(2, 1)).valid.all()
        assert env.restarts == 0, "nothing was lost: the run is what it would have been"  # type: ignore[attr-defined]
    finally:
        env.close()
    assert caplog.text.count("died while starting; it is started again") == deaths
    assert len(list((tmp_path / "starts").iterdir())) == 2 + deaths


def test_workers_that_never_start_end_the_run(tmp_path: Path, late: str) -> None:
    kwargs = {"folder": str(tmp_path / "starts"), "deaths": 100}
    with pytest.raises(
        RloptError, match=r"the worker of environment 0 died while starting; a script must .*backend=sy"
    ):
        make_env(late, 2, backend="async", kwargs=kwargs)
    assert len(list((tmp_path / "starts").iterdir())) <= 2 + 3


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_workers_end_with_a_trainer_that_is_killed_even_in_a_step_without_an_end(tmp_path: Path, late: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from rlopt.envs import make_env, workers\n"
        "if __name__ == '__main__':\n"
        "    workers._GRACE = 0.3\n"
        f"    env = make_env({late!r}, 2, backend='async', kwargs={{'folder': {str(tmp_path / 'starts')!r}}})\n"
        "    env.reset()\n"
        "    print(*(worker.process.pid for worker in env._workers), flush=True)\n"
        "    env.step(torch.tensor([[0.0], [1.0]]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        time.sleep(0.2)  # the second one is in its step
        trainer.kill()
    deadline = time.monotonic() + 20.0
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not left


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie that its new parent has not yet looked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path("/proc").is_dir()


def test_workers_import_what_is_installed_and_not_what_lies_around(
    tmp_path: Path, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh forkserver is needed, so this is a process of its own."""
    for name in ("torch", "numpy", "gymnasium", "socket"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write('{name} ')\n1 / 0\n")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "import os, sys\n"
        "from rlopt.envs import make_env\n"
        "if __name__ == '__main__':\n"
        f"    os.chdir({str(tmp_path)!r})\n"
        f"    sys.path.append({str(tmp_path)!r})\n"
        f"    env = make_env({late!r}, 1, backend='async', kwargs={{'folder': 'starts'}})\n"
        "    print(env.reset().tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "[[0.0, 0.0]]\n", done.stderr
    assert not (tmp_path / "imported").exists()
